"""`imagewright import WEIGHTS`: official weights into a model folder, without running their code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.errors import an
from imagewright.files import read_json
from imagewright.interop.reading import read_official
from imagewright.metrics.torch_file import read_state_dict
from imagewright.models.files import ModelFile, save_model
from imagewright.models.latents import LatentSpace
from imagewright.pretrained import find_model
from imagewright.types import DataSpec, UserError, kind_of

EPILOG = """examples:
  imagewright import edm-cifar10-32x32-cond-vp.pkl --out models/edm-cifar10
  imagewright import edm2-img64-s-1073741-0.075.pkl --out models/edm2-s
  imagewright import cd_imagenet64_lpips.pt --out models/cd
  imagewright import ddpm-cifar10-32/ --out models/ddpm
  imagewright import VCMamba-S.pth --key model --out models/vcmamba-s
  imagewright import metaclip-2-worldwide-s16/ --out models/metaclip2-s
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
    autoencoder: str | None = None,
    latent_stats: Path | None = None,
) -> None:
    """Convert official weights into a model folder that `sample` and `evaluate` take.

    Args:
        weights: .pkl, .pt, .pth, .bin, .ckpt or .safetensors, a diffusers folder or a folder of DMD2; nothing in it is
            executed.
        out: the model folder to write.
        config: JSON file with official constructor arguments, in place of or beside those that the file tells.
        kind: family of the weights: edm, edm2, dmd2, vct, guided-diffusion, consistency-models, ctm, ctm-cifar10,
            lightningdit, kl, vcmamba, clip; default by what they are.
        key: of a file with several networks or dictionaries, which one: ema.
        name: name of the data set the model was trained on; default the file's.
        autoencoder: run or model folder of the autoencoder in whose latents the model lives; or a model in them.
        latent_stats: with an autoencoder, a file of torch.save with the channels' "mean" and "std", as LightningDiT's
            program writes it (latents_stats.pt).
    """
    arguments: dict[str, Any] = {} if config is None else read_json(config, dict)
    found = read_official(weights, kind=kind, config=arguments, key=key, name=name)
    origin = {"imported_from": weights.name, "kind": found.kind}
    spec, space = found.spec, None
    if autoencoder is not None:
        spec, space = _latents_of(autoencoder, latent_stats, spec)
    elif latent_stats is not None:
        raise UserError("--latent-stats has no effect without --autoencoder")
    save_model(out, ModelFile(model=found.model, spec=spec, space=space, origin=origin))
    classes = f"{spec.num_classes} classes" if spec.num_classes else "no classes"
    levels = ""
    if kind_of(found.model) not in ("encoder", "autoencoder"):
        levels = f", noise levels {found.model.sigma_min:g} to {found.model.sigma_max:g}"
    say(
        f"{found.kind}: {type(found.model).__name__} of {spec.channels} x {spec.resolution} x {spec.resolution}, "
        f"{classes}{levels}; written to {out}"
    )


def _latents_of(name: str, stats: Path | None, spec: DataSpec) -> tuple[DataSpec, LatentSpace]:
    """What a model of latents (spec) makes when they are decoded, and the space. Raises UserError for another model."""
    file = find_model(name)
    if file.space is None and kind_of(file.model) != "autoencoder":
        raise UserError(f"--autoencoder {name} is {an(type(file.model).__name__)}, which has no latents")
    if (file.space is None) != (stats is not None):
        why = "needs --latent-stats" if stats is None else "knows its statistics; --latent-stats has no effect"
        raise UserError(f"--autoencoder {name} {why}")
    space = file.space
    if stats is not None:
        space = LatentSpace(file.model, 1.0)
        found = read_state_dict(stats)
        if set(found) != {"mean", "std"} or any(t.numel() != space.shape[0] for t in found.values()):
            raise UserError(f"{stats} does not hold mean and std of {space.shape[0]} channels")
        space.measured(found["mean"].flatten(), found["std"].flatten())
    assert space is not None
    if (spec.channels, spec.resolution) != space.shape[:2]:
        raise UserError(
            f"the model sees {spec.channels} channels of side {spec.resolution}; the latents of {name} have "
            f"{space.shape[0]} of side {space.shape[1]}"
        )
    return replace(file.spec, name=spec.name, num_classes=spec.num_classes, class_names=(), empty_classes=()), space


COMMANDS: Mapping[str, Callable[..., None]] = {"": import_command}


def main(args: Sequence[str]) -> None:
    """Parse and convert."""
    run(import_command, args, "imagewright import", EPILOG)
