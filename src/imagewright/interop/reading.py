"""One door for official weights: a file or folder becomes a model of ours and the specification of its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from imagewright.arrays import read_head, read_tensors
from imagewright.interop import clip
from imagewright.interop.diffusers_in import is_diffusers, read_diffusers
from imagewright.interop.official import from_official
from imagewright.interop.pickled import read_network
from imagewright.interop.recognise import CTM, PUBLISHED, inferred, recognise
from imagewright.metrics.torch_file import read_state_dict
from imagewright.pickles import LightningWords, Vocabulary
from imagewright.types import DataSpec, UserError, kind_of

PICKLED = {"EDMPrecond": "edm", "VPPrecond": "edm", "VEPrecond": "edm", "iDDPMPrecond": "edm", "Precond": "edm2"}
"""Kinds by the class of a pickled network."""
SUFFIXES = (".pkl", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Imported:
    """model: of ours, in eval mode. spec: of its pictures. kind: of the weights."""

    model: Any
    spec: DataSpec
    kind: str


def read_official(
    path: Path,
    *,
    kind: str | None = None,
    config: Mapping[str, Any] | None = None,
    key: str | None = None,
    name: str | None = None,
) -> Imported:
    """Official weights as a model of ours; nothing in the file is executed.

    kind: of the weights, None = by what they are. config: arguments in place of, or beside, those that the file tells.
    key: which network or dictionary of a file of several. name: of the data set; None = the file's.
    Raises UserError naming the file for what is missing, damaged, unknown, or not read.
    """
    given, kind = dict(config or {}), kind and kind.replace("_", "-")
    _require_foreign(path)
    if path.is_dir() and is_diffusers(path) and not clip.is_folder(path):
        if kind not in (None, "diffusers") or key is not None or given:
            raise UserError(
                f"{path} is a diffusers folder, which says all itself; leave out --kind, --key and --config"
            )
        model = read_diffusers(path)
        return Imported(model, _spec(model, name or path.resolve().name), "diffusers")
    if path.is_dir() and clip.is_folder(path):
        given, name = {**clip.told_by_folder(path), **given}, name or path.resolve().name
        path, kind = path / "model.safetensors", kind or "clip"
    elif path.is_dir():
        path, kind = _generator_of(path), kind or "dmd2"
    if path.suffix == ".pkl":
        kind, state, told = _pickled(path, kind, key)
    else:
        state = _state(path, key)
        kind = kind or recognise(state).kind
        assert kind is not None
        told = PUBLISHED.get(path.stem, CTM if kind == "ctm" else {}) or inferred(kind, state)
    model = from_official(state, kind, {**told, **given})
    return Imported(model, _spec(model, name or path.stem), kind)


def _require_foreign(path: Path) -> None:
    """Raise UserError where there is nothing, or a model of ours."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    weights = path if path.suffix == ".safetensors" else path / "model.safetensors"
    if weights.is_file() and "imagewright" in read_head(weights).texts:
        raise UserError(f"{path} is a model of imagewright's own; its folder is taken as it is")


def _pickled(path: Path, kind: str | None, key: str | None) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    network = read_network(path, key or "ema")
    if network.class_name not in PICKLED:
        raise UserError(f"{path} holds a {network.class_name!r}; read are {', '.join(PICKLED)}")
    found = PICKLED[network.class_name]
    if kind not in (None, found, "dmd2"):
        raise UserError(f"--kind is {kind}; {path} holds a network of {found}")
    own = {} if kind == "dmd2" else {"precond_class": network.class_name}
    return kind or found, network.state, {**network.arguments, **own}


def _state(path: Path, key: str | None) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not read: read are {', '.join(SUFFIXES)}, diffusers folders and DMD2's")
    if path.suffix == ".safetensors":
        if key is not None:
            raise UserError(f"--key says which part of a pickle holds the weights; it has no effect on {path}")
        return read_tensors(path)
    if path.suffix == ".ckpt":  # Lightning: all under one key, the averaged model's under "ema."
        state = read_state_dict(path, "state_dict", LightningWords)
        prefix = f"{key or 'ema'}."
        chosen = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not chosen:
            raise UserError(f"{path} has no weights under {prefix!r}; --key names others, such as model")
        return chosen
    return read_state_dict(path, key, Vocabulary if key is None else LightningWords, option="--key")


def _generator_of(folder: Path) -> Path:
    """DMD2 saves accelerate's folders: the first model is the generator, the second the fake score and critic."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        if (folder / name).exists():
            return folder / name
    raise UserError(
        f"{folder} is no folder of official weights: it has no model_index.json, config.json or pytorch_model.bin"
    )


def _spec(model: Any, name: str) -> DataSpec:
    config = model.network.config
    kind = kind_of(model)
    named = "num_classes" if kind == "encoder" else "label_dim"
    classes = 0 if kind == "autoencoder" else getattr(config, named, 0)
    return DataSpec(name=name, resolution=config.img_resolution, channels=config.in_channels, num_classes=classes)
