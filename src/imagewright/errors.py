"""What a user can mend, and the signals that announce the end: what the command line needs before torch is loaded."""

from __future__ import annotations

import signal


class UserError(ValueError):
    """Bad input that the user can mend: one sentence naming the file or option, the value and the allowed range.

    The command line prints the sentence alone and exits with code 2.
    """


def an(noun: str) -> str:
    """As it stands in a sentence: "a denoiser", "an encoder"; a leading U is read as in "U-Net"."""
    return f"{'an' if noun[:1] in tuple('AEIOaeio') else 'a'} {noun}"


ENDINGS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
"""What a user, a scheduler, a limit or a lost terminal sends to announce the end."""
