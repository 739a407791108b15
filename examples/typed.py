"""Commands as one types them: printed, then run, in this process. What the examples beside this file share."""

from __future__ import annotations

import shlex

from imagewright.cli.main import main


def typed(command: str) -> None:
    """Run `imagewright COMMAND`."""
    print(f"\n$ imagewright {command}", flush=True)
    main(shlex.split(command))
