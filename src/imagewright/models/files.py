"""A model on disk: `model.safetensors`, numbers and in their header what they mean. No code inside, none executed.

That one file is the model, so that it is there whole or not at all, whatever stops a writer. `model.json` beside it is
a copy of the description for people and their scripts; it is read only where the weights carry none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imagewright import limits
from imagewright.arrays import Head, Stored, read_head, read_tensors
from imagewright.errors import an
from imagewright.files import of_format, parse_json, read_formatted, replacing
from imagewright.models.description import blueprint, build, describe
from imagewright.models.latents import InLatents, LatentSpace
from imagewright.models.routed import RoutedMap
from imagewright.networks.quantized import count_parameters
from imagewright.shapes import Within
from imagewright.types import DataSpec, ModelKind, UserError, kind_of

FORMAT = "imagewright-model/1"
CONVENTIONS = {
    "images": "float32 NCHW in [-1, 1]",
    "sigma": "standard deviation of the noise in data units, x = x0 + sigma * eps",
    "labels": "int64 class index, -1 = none",
    "tokens": "int64 in raster order (row, column, channel), 0 to values - 1; values = unknown",
}


class SpecRecord(TypedDict):
    """A `DataSpec` as JSON."""

    name: str
    resolution: Annotated[int, Within(1, limits.SIDE)]
    channels: Annotated[int, Within(1, limits.SIDE)]
    num_classes: NotRequired[Annotated[int, Within(0, limits.CLASSES)]]
    class_names: NotRequired[list[str]]
    empty_classes: NotRequired[list[int]]


class ModelRecord(TypedDict):
    """What says of a model what it is."""

    format: str
    kind: ModelKind
    model: dict[str, Any]
    data: SpecRecord
    sampler: dict[str, Any] | None
    parameters: Annotated[int, Within(0)]
    weights_sha256: str
    origin: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model and what has to be known to use it.

    spec: of its images. space: the latents that it lives in; None = it sees images.
    sampler: settings of the default sampler, {"class": name, ...}. origin: provenance, JSON-able, free of form.
    weights_sha256: of the weights as they lie on disk; None for a model that does not.
    """

    model: nn.Module
    spec: DataSpec
    sampler: Mapping[str, Any] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    space: LatentSpace | None = None

    @property
    def seen(self) -> DataSpec:
        """What the model itself sees and makes: its images, or their latents."""
        return self.spec if self.space is None else self.space.spec(self.spec)

    @property
    def whole(self) -> nn.Module:
        """The model with the space that it lives in."""
        return self.model if self.space is None else InLatents(self.model, self.space)


def save_model(folder: Path, file: ModelFile, *, half: bool = False) -> None:
    """Write model.json, then model.safetensors, into a folder; neither is touched before both are written aside.

    half: store the floating-point parameters as float16 (they are loaded back as float32). Buffers, such as the
    frequencies of a noise embedding, keep their precision: they are few, and an error in them shifts every output.
    """
    model = file.whole
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if half:
        halved = {k for k, p in model.named_parameters() if p.is_floating_point()}
        state = {k: v.half() if k in halved else v for k, v in state.items()}
    header = {
        "format": FORMAT,
        "kind": kind_of(model),
        "model": describe(model),
        "data": asdict(file.spec),
        "sampler": file.sampler,
        "conventions": CONVENTIONS,
        "parameters": count_parameters(model),
        "weights_sha256": weights_hash(state),
        "origin": dict(file.origin),
    }
    # The weights are renamed last: they make it a model, and whatever stops a writer before may be done again.
    with replacing(folder / "model.safetensors") as weights_aside, replacing(folder / "model.json") as header_aside:
        header_aside.write_text(json.dumps(header, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        save_file(state, weights_aside, metadata={"imagewright": json.dumps(header)})


def load_model(folder: Path) -> ModelFile:
    """Read a model in eval mode, float32, on the CPU; of a `RoutedMap` no student until it is needed.

    What is described is held against the names and shapes of the weights before it is built: it costs no more than
    they. Raises UserError naming the file when it is missing, damaged, of an unknown format, or not as described.
    """
    weights_path = folder / "model.safetensors"
    header, where, head = _described(folder)
    try:
        planned = blueprint(header["model"], len(head.tensors))
        fault = _misfit(planned, head)
        spec = spec_of(header["data"])
    except (TypeError, UserError) as error:
        raise UserError(f"{where} is damaged: {error}") from None
    if fault is not None:
        raise UserError(f"{weights_path} does not fit its description: {fault}")
    routed = isinstance(planned, RoutedMap)
    state = Stored(weights_path) if routed else read_tensors(weights_path)  # of many students one may be asked for
    if weights_hash(state) != header["weights_sha256"]:
        raise UserError(f"{weights_path} does not hold the weights that its description is of")
    if isinstance(planned, RoutedMap):
        model: nn.Module = planned.read_by(partial(_student, folder, header))
    else:
        model = build(header["model"])
        model.load_state_dict(state)  # which copies into float32
    fault = _unlike(model, header["kind"], spec)
    if fault is not None:
        raise UserError(f"{where} is damaged: {fault}")
    model, space = (model.model, model.space) if isinstance(model, InLatents) else (model, None)
    return ModelFile(
        model=model.eval(),
        spec=spec,
        sampler=header["sampler"],
        origin=header["origin"],
        weights_sha256=header["weights_sha256"],
        space=None if space is None else space.eval(),
    )


def _student(folder: Path, header: ModelRecord, k: int) -> nn.Module:
    """A student of a model that was opened, float32, on the CPU. UserError where another model has taken its place."""
    path = folder / "model.safetensors"
    if read_model_record(folder)["weights_sha256"] != header["weights_sha256"]:
        raise UserError(f"{path} is another model than it was when it was opened; open it anew")
    student = build(header["model"]["students"][k])
    student.load_state_dict(dict(Stored(path, f"students.{k}.")))
    return student


def has_model(folder: Path) -> bool:
    """Whether there is a model in a folder, or what claims to be one."""
    return (folder / "model.safetensors").exists()


def read_model_record(folder: Path) -> ModelRecord:
    """What the model in a folder says that it is. Raises UserError where it is missing or damaged."""
    return _described(folder)[0]


def _described(folder: Path) -> tuple[ModelRecord, str, Head]:
    """The description, the name of where it stands, and the header of the weights."""
    weights_path, copy = folder / "model.safetensors", folder / "model.json"
    head = read_head(weights_path)
    text = head.texts.get("imagewright")
    if text is None:
        return read_formatted(copy, FORMAT, ModelRecord), str(copy), head
    where = f"{weights_path}: its description"
    return of_format(parse_json(text, where), where, FORMAT, ModelRecord), where, head


def spec_of(record: SpecRecord) -> DataSpec:
    """The specification that a record holds. Raises UserError where its classes do not agree with each other."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    try:
        spec = DataSpec(**values)
    except TypeError as error:
        raise UserError(str(error).replace("DataSpec.__init__()", "its data")) from None
    if spec.class_names and len(spec.class_names) != spec.num_classes:
        raise UserError(f"it names {len(spec.class_names)} of {spec.num_classes} classes")
    if not all(0 <= c < spec.num_classes for c in spec.empty_classes):
        raise UserError(f"empty_classes has a class that is none of the {spec.num_classes}")
    return spec


def _misfit(planned: nn.Module, head: Head) -> str | None:
    """What differs between a model that is not built yet and what a weights' file holds."""
    wanted = planned.state_dict()
    for name in sorted({*wanted, *head.tensors}):
        if name not in head.tensors:
            return f"it lacks {name!r}"
        if name not in wanted:
            return f"it holds {name!r}, which the model has not"
        dtype, shape = head.tensors[name]
        if shape != tuple(wanted[name].shape):
            return f"{name!r} has shape {list(shape)}, the model's has {list(wanted[name].shape)}"
        if dtype.is_floating_point != wanted[name].is_floating_point():
            return f"{name!r} is {dtype}, the model's is {wanted[name].dtype}"
    # Float16 takes four bytes once it is loaded, and tables that are computed are in no file.
    bytes_needed = sum(t.numel() * t.element_size() for t in (*planned.parameters(), *planned.buffers()))
    return None if bytes_needed <= 4 * head.size + limits.SPARE else f"the model would take {bytes_needed} bytes"


def _unlike(model: nn.Module, kind: str, spec: DataSpec) -> str | None:
    """What the header says of a model that the model is not."""
    if kind_of(model) != kind:
        return f"kind is {kind!r}; the model is {an(kind_of(model))}"
    if isinstance(model, InLatents):
        inner = _unlike(model.space.autoencoder, "autoencoder", spec)
        return inner or _unlike(model.model, kind, model.space.spec(spec))
    if isinstance(model, RoutedMap):
        if len(model.table) != spec.num_classes:
            return f"data.num_classes is {spec.num_classes}; the table is of {len(model.table)}"
        return next((fault for each in model.students if (fault := _unlike(each, kind, spec)) is not None), None)
    config = getattr(getattr(model, "network", None), "config", None)
    side, classes = getattr(config, "img_resolution", None), getattr(config, "label_dim", 0)
    channels, latent = getattr(config, "in_channels", None), getattr(model, "latent", None)
    if latent is not None:  # what it denoises follows from its own description, and is decoded to images
        side = channels = None
    if side not in (None, spec.resolution):
        return f"data.resolution is {spec.resolution}; the network's is {side}"
    if channels not in (None, getattr(model, "shown", 1) * spec.channels):
        return f"data.channels is {spec.channels}; the network's are {channels}"
    if classes and spec.num_classes > classes:
        return f"data.num_classes is {spec.num_classes}; the network knows {classes}"
    return None


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a state dict, in the order of the names."""
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
