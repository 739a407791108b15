"""`imagewright import WEIGHTS`: official weights into a model folder, without running their code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import tyro

from imagewright import limits
from imagewright.arrays import read_tensors
from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.files import read_json
from imagewright.interop import from_official
from imagewright.metrics.torch_file import read_state_dict
from imagewright.models.files import ModelFile, save_model
from imagewright.shapes import Within
from imagewright.types import DataSpec, UserError

EPILOG = """examples:
  imagewright import edm-cifar10.safetensors --config edm-cifar10.json --out models/edm-cifar10

config.json holds the official constructor's arguments, for example
  {"precond_class": "EDMPrecond", "img_resolution": 32, "img_channels": 3, "label_dim": 10,
   "model_type": "SongUNet", "model_channels": 128, "channel_mult": [2, 2, 2], "augment_dim": 9}
Without sigma_min and sigma_max an EDMPrecond gets the range of the official sampler, 0.002 to 80.
"""


class _Arguments(TypedDict):
    img_resolution: Annotated[int, Within(1, limits.SIDE)]
    img_channels: Annotated[int, Within(1, limits.SIDE)]
    label_dim: NotRequired[Annotated[int, Within(0, limits.CLASSES)]]


def import_command(
    weights: Annotated[Path, tyro.conf.Positional],
    config: Path,
    out: Path,
    kind: str = "edm",
    key: str | None = None,
    name: str | None = None,
) -> None:
    """Convert a state dict of official weights into a model folder that `sample` and `evaluate` take.

    Args:
        weights: .safetensors, or a .pt/.pth of plain tensors (read without executing anything in it).
        config: JSON file with the official constructor's arguments and "precond_class".
        out: the model folder to write.
        kind: family of the weights; edm.
        key: of a .pt file that holds several dictionaries, which one: ema.
        name: name of the data set the model was trained on; default the file's.
    """
    if key is not None and weights.suffix not in (".pt", ".pth"):
        raise UserError(f"--key says which dictionary of a .pt file holds the weights; it has no effect on {weights}")
    if weights.suffix == ".safetensors":
        state = read_tensors(weights)
    elif weights.suffix in (".pt", ".pth"):
        state = read_state_dict(weights, key)
    else:
        raise UserError(
            f"{weights} is not read: only .safetensors, .pt and .pth state dicts are. A pickle of a whole network "
            "(.pkl) runs code when opened; save its state_dict() as .safetensors where you trust it, once"
        )
    arguments: dict[str, Any] = {**read_json(config, _Arguments)}
    model = from_official(state, kind=kind, config=arguments)
    spec = DataSpec(
        name=name or weights.stem,
        resolution=arguments["img_resolution"],
        channels=arguments["img_channels"],
        num_classes=arguments.get("label_dim", 0),
    )
    save_model(out, ModelFile(model=model, spec=spec, origin={"imported_from": weights.name, "kind": kind}))
    say(f"written to {out}")


COMMANDS: Mapping[str, Callable[..., None]] = {"": import_command}


def main(args: Sequence[str]) -> None:
    """Parse and convert."""
    run(import_command, args, "imagewright import", EPILOG)
