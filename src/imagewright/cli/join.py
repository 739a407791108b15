"""`imagewright join STUDENT STUDENT ... --out FOLDER`: students of parts of the classes as one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.models.files import has_model, save_model
from imagewright.training.students import joined
from imagewright.types import UserError

EPILOG = """examples:
  imagewright join runs/low runs/high --out models/digits

Each student is a one-step generator that was trained on some of the classes (--data.classes 0-4).
"""


def join_command(students: Annotated[tuple[str, ...], tyro.conf.Positional], out: Path, half: bool = False) -> None:
    """Make one model of several students, in which an image's class says which of them makes it.

    Args:
        students: run or model folders; each class is the student's that saw pictures of it.
        out: the folder to write, which must not hold a model yet.
        half: store the weights in 16 bits (they are read back as 32).
    """
    if has_model(out):
        raise UserError(f"{out} already holds a model; choose another --out")
    file = joined(students)
    save_model(out, file, half=half)
    nobody = f"; nobody makes classes {list(file.spec.empty_classes)}" if file.spec.empty_classes else ""
    say(f"written to {out}: {len(students)} students of {len(file.spec.known_classes)} classes{nobody}")


COMMANDS: Mapping[str, Callable[..., None]] = {"": join_command}


def main(args: Sequence[str]) -> None:
    """Parse and join."""
    run(join_command, args, "imagewright join", EPILOG)
