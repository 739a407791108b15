"""`imagewright import WEIGHTS`: official weights into a model folder, without running their code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.files import read_json
from imagewright.interop.reading import read_official
from imagewright.models.files import ModelFile, save_model
from imagewright.types import kind_of

EPILOG = """examples:
  imagewright import edm-cifar10-32x32-cond-vp.pkl --out models/edm-cifar10
  imagewright import edm2-img64-s-1073741-0.075.pkl --out models/edm2-s
  imagewright import cd_imagenet64_lpips.pt --out models/cd
  imagewright import ddpm-cifar10-32/ --out models/ddpm
  imagewright import VCMamba-S.pth --key model --out models/vcmamba-s
  imagewright import weights.safetensors --config edm.json --out models/edm

What a file is, and its arguments, are read from it where it tells them: a pickle of EDM, EDM2, SiD or DDO says all, so
does a diffusers folder, and EDM's, EDM2's and DMD2's tensors tell all but the dropout. OpenAI's published files are
known by their names; others need --config with the flags of their sampling script. docs/importing.md has the table.
"""


def import_command(
    weights: Annotated[Path, tyro.conf.Positional],
    out: Path,
    config: Path | None = None,
    kind: str | None = None,
    key: str | None = None,
    name: str | None = None,
) -> None:
    """Convert official weights into a model folder that `sample` and `evaluate` take.

    Args:
        weights: .pkl, .pt, .pth, .bin, .ckpt or .safetensors, a diffusers folder or a folder of DMD2; nothing in it is
            executed.
        out: the model folder to write.
        config: JSON file with official constructor arguments, in place of or beside those that the file tells.
        kind: family of the weights: edm, edm2, dmd2, vct, guided-diffusion, consistency-models, ctm, ctm-cifar10,
            lightningdit, vcmamba; default by what they are.
        key: of a file with several networks or dictionaries, which one: ema.
        name: name of the data set the model was trained on; default the file's.
    """
    arguments: dict[str, Any] = {} if config is None else read_json(config, dict)
    found = read_official(weights, kind=kind, config=arguments, key=key, name=name)
    origin = {"imported_from": weights.name, "kind": found.kind}
    save_model(out, ModelFile(model=found.model, spec=found.spec, origin=origin))
    spec = found.spec
    classes = f"{spec.num_classes} classes" if spec.num_classes else "no classes"
    levels = ""
    if kind_of(found.model) != "encoder":
        levels = f", noise levels {found.model.sigma_min:g} to {found.model.sigma_max:g}"
    say(
        f"{found.kind}: {type(found.model).__name__} of {spec.channels} x {spec.resolution} x {spec.resolution}, "
        f"{classes}{levels}; written to {out}"
    )


COMMANDS: Mapping[str, Callable[..., None]] = {"": import_command}


def main(args: Sequence[str]) -> None:
    """Parse and convert."""
    run(import_command, args, "imagewright import", EPILOG)
