"""A model on disk: `model.safetensors` (numbers) and `model.json` (what they mean). No code inside, none executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imagewright.files import read_json, replacing, write_json
from imagewright.models.description import build, describe
from imagewright.types import DataSpec, UserError

FORMAT = "imagewright-model/1"
CONVENTIONS = {
    "images": "float32 NCHW in [-1, 1]",
    "sigma": "standard deviation of the noise in data units, x = x0 + sigma * eps",
    "labels": "int64 class index, -1 = none",
}


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model and what has to be known to use it.

    sampler: settings of the default sampler, {"class": name, ...}. origin: provenance, JSON-able, free of form.
    """

    model: nn.Module
    spec: DataSpec
    sampler: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)


def save_model(folder: Path, file: ModelFile, *, half: bool = False) -> None:
    """Write model.safetensors and model.json into a folder, each atomically.

    half: store floating-point weights as float16 (they are loaded back as float32).
    """
    state = {k: v.detach().cpu().contiguous() for k, v in file.model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    header = {
        "format": FORMAT,
        "kind": "flow_map" if getattr(file.model, "is_flow_map", False) else "denoiser",
        "model": describe(file.model),
        "data": asdict(file.spec),
        "sampler": file.sampler,
        "conventions": CONVENTIONS,
        "parameters": sum(p.numel() for p in file.model.parameters()),
        "weights_sha256": weights_hash(state),
        "origin": dict(file.origin),
    }
    with replacing(folder / "model.safetensors") as aside:
        # The header travels inside the weights too: a safetensors file on its own still says what it is.
        save_file(state, aside, metadata={"imagewright": json.dumps(header)})
    write_json(folder / "model.json", header)


def load_model(folder: Path) -> ModelFile:
    """Read a model in eval mode, float32, on the CPU.

    Raises UserError naming the file when one is missing, damaged, of an unknown format, or does not match the other.
    """
    header = read_json(folder / "model.json")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise UserError(f"{folder / 'model.json'} has format {found!r}; this version reads {FORMAT!r}")
    state = read_tensors(folder / "model.safetensors")
    if weights_hash(state) != header.get("weights_sha256"):
        raise UserError(f"{folder / 'model.safetensors'} does not hold the weights that model.json describes")
    model = build(header["model"])
    try:
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except RuntimeError as error:
        raise UserError(f"{folder / 'model.safetensors'} does not fit model.json: {error}") from None
    data = dict(header["data"], class_names=tuple(header["data"]["class_names"]))
    spec = DataSpec(**data)
    return ModelFile(model=model.eval(), spec=spec, sampler=header["sampler"], origin=header["origin"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises UserError naming the file when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in the order of the names."""
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
