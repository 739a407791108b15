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

from imagewright.files import read_json, replacing
from imagewright.models.description import build, describe
from imagewright.types import DataSpec, UserError, kind_of

FORMAT = "imagewright-model/1"
CONVENTIONS = {
    "images": "float32 NCHW in [-1, 1]",
    "sigma": "standard deviation of the noise in data units, x = x0 + sigma * eps",
    "labels": "int64 class index, -1 = none",
    "tokens": "int64 in raster order (row, column, channel), 0 to values - 1; values = unknown",
}


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model and what has to be known to use it.

    sampler: settings of the default sampler, {"class": name, ...}. origin: provenance, JSON-able, free of form.
    weights_sha256: of the weights as they lie on disk; None for a model that does not.
    """

    model: nn.Module
    spec: DataSpec
    sampler: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None


def save_model(folder: Path, file: ModelFile, *, half: bool = False) -> None:
    """Write model.safetensors and model.json into a folder; neither is touched before both are written aside.

    half: store the floating-point parameters as float16 (they are loaded back as float32). Buffers, such as the
    frequencies of a noise embedding, keep their precision: they are few, and an error in them shifts every output.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in file.model.state_dict().items()}
    if half:
        halved = {k for k, p in file.model.named_parameters() if p.is_floating_point()}
        state = {k: v.half() if k in halved else v for k, v in state.items()}
    header = {
        "format": FORMAT,
        "kind": kind_of(file.model),
        "model": describe(file.model),
        "data": asdict(file.spec),
        "sampler": file.sampler,
        "conventions": CONVENTIONS,
        "parameters": sum(p.numel() for p in file.model.parameters()),
        "weights_sha256": weights_hash(state),
        "origin": dict(file.origin),
    }
    with replacing(folder / "model.json") as header_aside, replacing(folder / "model.safetensors") as weights_aside:
        header_aside.write_text(json.dumps(header, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        # The header travels inside the weights too: a safetensors file on its own still says what it is.
        save_file(state, weights_aside, metadata={"imagewright": json.dumps(header)})


def load_model(folder: Path) -> ModelFile:
    """Read a model in eval mode, float32, on the CPU.

    Raises UserError naming the file when one is missing, damaged, of an unknown format, or does not match the other.
    """
    header_path, weights_path = folder / "model.json", folder / "model.safetensors"
    header = read_json(header_path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else type(header).__name__
        raise UserError(f"{header_path} has format {found!r}; this version reads {FORMAT!r}")
    state = read_tensors(weights_path)
    if weights_hash(state) != header.get("weights_sha256"):
        raise UserError(f"{weights_path} does not hold the weights that model.json describes")
    try:
        model = build(header["model"])
        data = header["data"]
        spec = DataSpec(**data | {k: tuple(data[k]) for k in ("class_names", "empty_classes") if k in data})
        sampler, origin = header["sampler"], header["origin"]
    except KeyError as error:
        raise UserError(f"{header_path} lacks the entry {error}") from None
    except (TypeError, UserError) as error:
        raise UserError(f"{header_path} is damaged: {error}") from None
    try:
        model.load_state_dict(state)  # which copies into float32
    except RuntimeError as error:
        raise UserError(f"{weights_path} does not fit model.json: {' '.join(str(error).split())}") from None
    return ModelFile(
        model=model.eval(), spec=spec, sampler=sampler, origin=origin, weights_sha256=header["weights_sha256"]
    )


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
