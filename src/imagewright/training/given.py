"""What a method is given: it asks by names and types of its `parts`' parameters, and the run says where things lie.

    def parts(self, *, network: nn.Module, teacher: Denoiser, judges: Sequence[Encoder], prior: TokenModel | None)

A parameter whose type is a protocol of models (`Denoiser`, `FlowMap`, `TokenModel`, `Codec`, `Autoencoder`, `Encoder`,
or several of them with `|`) is a model: found, checked for its kind and fit, and recorded. `Sequence[...]` asks for
several, `... | None` for one that may be left out. A type of the method's own with a classmethod `open(name)` and an
`identity` (what the record says of it) is opened. What the run names and nobody asked for is refused.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from imagewright.data.couplings import Couplings
from imagewright.errors import an
from imagewright.methods.distances import Features
from imagewright.metrics.perceptual import CHOICES, perceptual_network
from imagewright.models.discrete_latents import LatentDenoiser
from imagewright.models.files import ModelFile, weights_hash
from imagewright.models.kinds import KINDS, words
from imagewright.models.latents import LatentSpace
from imagewright.models.tokens import PixelCodec
from imagewright.networks.quantized import is_quantized
from imagewright.pretrained import find_model
from imagewright.training.latents import open_latents
from imagewright.types import (
    Autoencoder,
    Batch,
    Codec,
    DataSpec,
    Encoder,
    Example,
    Examples,
    ModelKind,
    UserError,
    kind_of,
)

Given = Mapping[str, str | tuple[str, ...]]
"""Where a run's inputs lie, by the names under which the method asks for them."""
NAMES: Mapping[Any, str] = {Codec: "tokenizer"}
"""Types that are asked for by another name than the parameter's."""
PROTOCOLS: Mapping[Any, ModelKind] = {kind.protocol: name for name, kind in KINDS.items()}
_TRAIN_ONE = "imagewright train kl-digits"
LEARNS: Mapping[str, str] = {
    "teacher": "learns from no teacher",
    "tokenizer": "learns no tokens",
    "features": "compares no features",
    "autoencoder": "learns from no images that could be latents",
}


def named(**given: str | PathLike[str] | Sequence[str | PathLike[str]] | None) -> Given:
    """What a run is given, as texts and tuples of them, without what is empty."""
    return {name: _texts(where) for name, where in given.items() if where}


def _texts(where: str | PathLike[str] | Sequence[str | PathLike[str]]) -> str | tuple[str, ...]:
    return fspath(where) if isinstance(where, str | PathLike) else tuple(fspath(each) for each in where)


@runtime_checkable
class Openable(Protocol):
    """Something of a method's own that a run names."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of it, so that a resumed run is given the same; JSON values."""
        ...

    @classmethod
    def open(cls, name: str) -> Openable:
        """What lies there. Raises UserError."""
        ...


@dataclass(frozen=True)
class Request:
    """One input that a method asks for.

    name: under which the run names it. kinds: of model that it may be, () for what is no model. type: what it is.
    """

    parameter: str
    name: str
    type: Any
    kinds: tuple[ModelKind, ...]
    several: bool
    optional: bool


def requests(method: Any) -> dict[str, Request]:
    """What a method asks the run to name, by the parameters of its `parts`; that made by the run itself is left out."""
    hints = typing.get_type_hints(method.parts)
    asked = (_request(name, hints.get(name), p) for name, p in inspect.signature(method.parts).parameters.items())
    return {request.parameter: request for request in asked if request is not None}


SPACE = Request("autoencoder", "autoencoder", Autoencoder, ("autoencoder",), several=False, optional=True)
"""What every run on images may be given: an autoencoder, in whose latents its model then lives."""


def options(method: Any) -> dict[str, Request]:
    """What a run may name for a method, by name: what the method asks for, and an autoencoder to live in."""
    asked = {request.name: request for request in requests(method).values()}
    tokens = any("codec" in request.kinds for request in asked.values())
    images = tokens or getattr(method, "of_images", False) or _examples(method) is not Batch
    return asked if images or SPACE.name in asked else {**asked, SPACE.name: SPACE}


def _request(parameter: str, annotation: Any, signature: inspect.Parameter) -> Request | None:
    members = [m for m in _members(annotation) if m is not type(None)]
    optional = len(members) < len(_members(annotation)) or signature.default is not inspect.Parameter.empty
    several = len(members) == 1 and typing.get_origin(members[0]) in (collections.abc.Sequence, tuple, list)
    if several:
        members = list(_members(typing.get_args(members[0])[0]))
    kinds = tuple(PROTOCOLS[m] for m in members if m in PROTOCOLS)
    kind = members[0] if len(members) == 1 else None
    named = bool(kinds) or _is_features(annotation) or (isinstance(kind, type) and hasattr(kind, "open"))
    if not named or kind is Couplings:
        return None
    of = annotation if kind is None else kind
    return Request(parameter, NAMES.get(kind, parameter), of, kinds, several, optional)


def _members(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _is_features(annotation: Any) -> bool:
    return annotation in (Features, Features | None)


class Sources:
    """Where what an experiment names is found; a dry run has another, with stand-ins for what is not there.

    inputs: notes what identifies each thing that was asked for. space: the latents in which the run is, if it is.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.inputs: dict[str, dict[str, Any]] = {}
        self.device = device
        self.space: LatentSpace | None = None

    def given(self, role: str, name: str) -> ModelFile:
        """The model that an experiment names for a role, whose weights are noted. UserError for another space."""
        file = self.model(name)
        if is_quantized(file.model):
            raise UserError(f"{role} {name} is quantized, so its weights cannot be trained; give what it was made of")
        _check_space(role, name, file, self.space)
        self._note(role, file.model)
        return file

    def enter(self, name: str, scale: float) -> ModelFile:
        """An autoencoder, or a model in latents, whose space is entered; `space` is set, and noted.

        scale: of an autoencoder's latents; a model's are as they are. Raises UserError for what is neither.
        """
        file = self.model(name)
        kind = kind_of(file.model)
        if file.space is None and kind != "autoencoder":
            what = KINDS[kind].what
            raise UserError(f"autoencoder {name} is {an(words(kind))}, which {what}; train one with: {_TRAIN_ONE}")
        self.space = LatentSpace(file.model, scale) if file.space is None else file.space
        self._note(SPACE.name, file.model if file.space is None else file.space)
        return file

    def _note(self, role: str, module: nn.Module) -> None:
        state = module.state_dict()
        if not any(tensor.is_meta for tensor in state.values()):
            self.inputs[role] = {"weights_sha256": weights_hash(state)}

    def latents(self, images: Any, measure: bool, **settings: Any) -> Any:
        """The images in the latents of the space that was entered."""
        assert self.space is not None
        return open_latents(images, self.space, measure=measure, device=self.device, **settings)

    def opened(self, role: str, kind: type[Openable], name: str) -> Openable:
        """A thing of a method's own, whose identity is noted."""
        found = kind.open(name)
        self.inputs[role] = found.identity
        return found

    def images(self, data: Any, on_progress: Any) -> Any:
        """The data set of a configuration."""
        return data.open(on_progress)

    def model(self, name: str) -> ModelFile:
        """A model that the run names."""
        return find_model(name)

    def couplings(self, name: str) -> Couplings | None:
        """The pairs."""
        return Couplings(name)

    def features(self, name: str | None, spec: DataSpec) -> nn.Module | None:
        """What a perceptual distance compares by; an encoder's weights are noted."""
        network = perceptual_network(name, spec)
        if name is not None and name not in CHOICES:
            self.inputs["features"] = {"weights_sha256": getattr(network, "sha256", None)}
        return network


def gather(method: Any, given: Given, spec: DataSpec, sources: Sources) -> dict[str, Any]:
    """What a method's `parts` asks of the run, by parameter. Raises UserError for what is missing, unfit or unasked."""
    asked = requests(method)
    require_asked(method, given)
    found = {p: _found(r, given.get(r.name), spec, sources, type(method).__name__) for p, r in asked.items()}
    for parameter, value in found.items():
        if isinstance(value, LatentDenoiser) and not getattr(method, "tells_latents", False):
            where = f"{asked[parameter].name} {given.get(asked[parameter].name)}"
            raise UserError(
                f"{where} is told discrete latents, of which method {type(method).__name__} knows nothing; give it a "
                "plain denoiser"
            )
    return {parameter: value for parameter, value in found.items() if value is not _LEFT_OUT}


def require_asked(method: Any, given: Given) -> None:
    """Raise UserError where a run names what its method does not ask for."""
    names = options(method)
    for name in given:
        if name not in names:
            why = LEARNS.get(name, f"asks for no {name}")
            raise UserError(f"method {type(method).__name__} {why}; {name} has no effect")


_LEFT_OUT = object()


def _found(request: Request, where: Any, spec: DataSpec, sources: Sources, method: str) -> Any:
    if _is_features(request.type):
        return sources.features(where, spec)
    if request.several:
        if not where and not request.optional:
            raise UserError(f"this method learns from {request.name}; give them with --{request.name} RUN RUN ...")
        names = (where,) if isinstance(where, str) else tuple(where or ())
        return [_one(request, f"{request.name}.{i}", name, spec, sources) for i, name in enumerate(names)]
    if where is None and "codec" in request.kinds:
        return PixelCodec(spec.resolution, spec.channels)
    if where is None and request.optional:
        return _LEFT_OUT
    if where is None:
        what = f"learns from {an(request.name)}" if request.kinds else f"needs {request.name}"
        place = "RUN" if request.kinds else "PATH"
        raise UserError(f"this method {what}; give one with --{request.name} {place}")
    if not isinstance(where, str):
        raise UserError(f"{request.name} is {', '.join(where)}; this method takes one")
    return _one(request, request.name, where, spec, sources)


def _one(request: Request, role: str, name: str, spec: DataSpec, sources: Sources) -> Any:
    if not request.kinds:
        return sources.opened(role, request.type, name)
    file = sources.given(role, name)
    kind = kind_of(file.model)
    if kind not in request.kinds:
        wanted = " or ".join(an(words(k)) for k in request.kinds)
        hint = "; train one with `imagewright train vq-digits` or the like" if "codec" in request.kinds else ""
        raise UserError(
            f"{request.name} {name} is {an(words(kind))}, which {KINDS[kind].what}; this method takes {wanted}{hint}"
        )
    ours, theirs = KINDS[kind].agreement(spec), KINDS[kind].agreement(file.seen)
    if ours != theirs:
        what = "resolution, channels and classes" if len(ours) == 3 else "resolution and channels"
        does = "takes" if KINDS[kind].answers else "makes"
        raise UserError(f"{request.name} {name} {does} images of {what} {theirs}; the data have {ours}")
    if kind == "encoder" and spec.channels not in (1, seen := cast(Encoder, file.model).view.channels):
        raise UserError(f"{request.name} {name} sees images of {seen} channel(s); the data have {spec.channels}")
    # Students begin as copies of their teachers, which their methods freeze; what only answers is frozen here.
    return file.model.eval().requires_grad_(False) if KINDS[kind].answers else file.model


def sizes_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a network's configuration takes from the things that a method is given: sizes of tokens or of latents.

    Discrete latents are the channels of one place, each of its own meaning.
    """
    sizes: dict[str, Any] = {}
    for thing in found.values():
        kind = kind_of(thing) if isinstance(thing, nn.Module) else None
        if kind == "codec":
            sizes |= {"values": thing.values, "length": thing.length, "channels": getattr(thing, "channels", 1)}
        elif kind == "autoencoder":
            channels, side, _ = thing.latent
            sizes |= {"img_resolution": side, "in_channels": channels, "out_channels": channels}
        elif isinstance(thing, LatentDenoiser):
            latents = thing.encoder.config
            sizes |= {"values": latents.values, "length": latents.length, "channels": latents.length}
    return sizes


def check_examples(method: Any, data: Examples) -> None:
    """Raise UserError where a method's step learns from another kind of example than a data set yields."""
    wanted = _examples(method)
    if isinstance(wanted, type) and issubclass(wanted, Example) and not issubclass(data.example, wanted):
        raise UserError(
            f"method {type(method).__name__} learns from {_spelled(wanted)}; {data.source} holds "
            f"{_spelled(data.example)}"
        )


def _examples(method: Any) -> Any:
    """The kind of example that a method learns from."""
    return typing.get_type_hints(method.step).get("batch", Batch)


def _check_space(role: str, name: str, file: ModelFile, space: LatentSpace | None) -> None:
    """Raise UserError unless a model that makes something sees what the run sees: images, or latents of one space."""
    if KINDS[kind_of(file.model)].answers or (file.space is None and space is None):
        return
    if space is None:
        raise UserError(f"{role} {name} lives in an autoencoder's latents; add --autoencoder {name}")
    if file.space is None:
        raise UserError(f"{role} {name} makes images; this run is in the latents of an autoencoder")
    if not space.same_as(file.space):
        raise UserError(
            f"{role} {name} lives in other latents than those of this run's autoencoder; add --autoencoder {name}"
        )


def _spelled(example: type[Example]) -> str:
    """What a kind of example is, in words: the head of its documentation."""
    head = (example.__doc__ or example.__name__).strip().split(".")[0].split(":")[0].split("\n")[0]
    return head[:1].lower() + head[1:]


__all__ = [
    "Given",
    "Openable",
    "Request",
    "Sources",
    "check_examples",
    "gather",
    "named",
    "requests",
    "require_asked",
    "sizes_of",
]
