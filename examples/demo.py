"""The demo: an EDM denoiser on handwritten digits, its one-step student, their measures and one report.

Every step is a command that you can type yourself; the demo prints each before it runs it.
"""

from __future__ import annotations

import shlex
import time

from imagewright.cli.main import main

TEACHER, STUDENT = "runs/demo/teacher", "runs/demo/student"
COMMANDS = [
    f"train edm-digits --out {TEACHER} --resume",
    f"train cd-digits --teacher {TEACHER} --out {STUDENT} --resume",
    f"evaluate {TEACHER} --steps 18",
    f"evaluate {STUDENT}",
    f"evaluate {STUDENT} --set sigmas=[0.4]",
    f"report {TEACHER} {STUDENT} --out runs/demo/report.html",
]


def run() -> None:
    """Run the commands; the same call again goes on where it was interrupted."""
    started = time.monotonic()
    for command in COMMANDS:
        print(f"\n$ imagewright {command}", flush=True)
        main(shlex.split(command))
    print(f"\n{time.monotonic() - started:.0f} s in all. Open runs/demo/report.html")


if __name__ == "__main__":
    run()
