"""The `imagewright` command, also as `python -m imagewright`. Importing it takes seconds, and may be interrupted."""

from __future__ import annotations

import sys

from imagewright.leaving import is_alone, run_and_leave


def main() -> None:
    """As `cli.main.main`. Exits with 130 after Ctrl-C while the program is still being read."""
    try:
        from imagewright.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("imagewright: interrupted\n")
        raise SystemExit(130) from None
    if is_alone():
        run()
    else:
        run_and_leave(run)


if __name__ == "__main__":
    main()
