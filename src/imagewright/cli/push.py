"""`imagewright push MODEL owner/name`: a model, with its card, to a hub of model repositories."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.interop.card import write_card
from imagewright.interop.hub import push
from imagewright.models.files import save_model
from imagewright.pretrained import find_model, folder_of

EPILOG = """examples:
  imagewright push runs/edm-digits me/edm-digits --private
  imagewright sample hub:me/edm-digits --n 16

The hub is huggingface_hub's (pip install 'imagewright[hub]'), which also knows who you are: hf auth login.
"""


def push_command(
    model: Annotated[str, tyro.conf.Positional],
    name: Annotated[str, tyro.conf.Positional],
    private: bool = False,
    half: bool = False,
) -> None:
    """Upload a model's weights, description and card.

    Args:
        model: run folder, model folder or shipped model.
        name: owner/name of the repository; it is made where there is none.
        private: make it a private one.
        half: store the weights in 16 bits.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), find_model(model), half=half)
        write_card(Path(folder), folder_of(model) / "metrics.json")
        say(f"pushed to {push(Path(folder), name, private=private)}")


COMMANDS: Mapping[str, Callable[..., None]] = {"": push_command}


def main(args: Sequence[str]) -> None:
    """Parse and upload."""
    run(push_command, args, "imagewright push", EPILOG)
