"""`imagewright export RUN`: a run's model on its own, to keep, share or ship; in half the size if asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.models.files import has_model, save_model
from imagewright.pretrained import find_model
from imagewright.types import UserError

EPILOG = """examples:
  imagewright export runs/edm-emoji64-32 --out models/emoji --half
  imagewright sample models/emoji --n 16
"""


def export_command(model: Annotated[str, tyro.conf.Positional], out: Path, half: bool = False) -> None:
    """Copy the averaged weights of a run, with their description, into a model folder of two files.

    Args:
        model: run folder, model folder or shipped model.
        out: the model folder to write; it must not hold a model yet.
        half: store the weights in 16 bits (they are read back as 32).
    """
    if has_model(out):
        raise UserError(f"{out} already holds a model; choose another --out")
    save_model(out, find_model(model), half=half)
    size = (out / "model.safetensors").stat().st_size
    say(f"written to {out} ({size / 1e6:.2f} MB)")


COMMANDS: Mapping[str, Callable[..., None]] = {"": export_command}


def main(args: Sequence[str]) -> None:
    """Parse and copy."""
    run(export_command, args, "imagewright export", EPILOG)
