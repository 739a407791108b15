"""`imagewright distill RUN`: a one-step student of a run, on its images, as long as half of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from imagewright.cli import train
from imagewright.cli.console import say
from imagewright.types import UserError

HELP = """imagewright distill RUN [options]: train a one-step generator from a denoiser

Images, resolution, batch, precision and length come from the teacher's run, as far as no option says otherwise; the
options are those of `imagewright train distill --help`.

examples:
  imagewright distill runs/auto-photos-64
  imagewright distill runs/auto-photos-64 --by dmd2 --out runs/photos-dmd2
  imagewright distill emoji64-32 --training.total-images 20000
"""
COMMANDS: Mapping[str, Callable[..., None]] = {}


def main(args: Sequence[str]) -> None:
    """Train the student."""
    if not args or args[0] in ("-h", "--help"):
        say(HELP)
        return
    if args[0].startswith("-"):
        raise UserError("imagewright distill needs the teacher first: imagewright distill RUN [options]")
    train.main(["distill", "--teacher", *args])
