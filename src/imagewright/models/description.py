"""Models as JSON: `describe` says what a module is, `build` makes it again, without its weights.

A description is {"class": name, **constructor arguments}; an argument that is itself a module is again
one, and one that is a list of modules a list of descriptions. A network's only argument is its
configuration: {"class": "SongUNet", "config": {...}}; one of few bits says how many in "quantized".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, get_type_hints

import torch
from torch import nn
from torch.nn.modules import module as registry

from imagewright import limits
from imagewright.models.acceleration import AccelerationFlow, InitialVelocity
from imagewright.models.aligned import AlignedFlowMap
from imagewright.models.bits import BitDenoiser
from imagewright.models.causal import CausalTokenModel
from imagewright.models.classifier import Classifier
from imagewright.models.consistency import ConsistencyModel, ContinuousConsistencyModel
from imagewright.models.coupled import CoupledConsistencyModel
from imagewright.models.discrete_latents import LatentDenoiser
from imagewright.models.edm2 import EDM2Precond
from imagewright.models.event_encoder import EventEncoder
from imagewright.models.flow import EDMFlow, VEFlow, VelocityFlow, VPFlow
from imagewright.models.generator import FewStepGenerator
from imagewright.models.image_text import ImageText
from imagewright.models.kl import GaussianAutoencoder
from imagewright.models.latents import InLatents, LatentSpace
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.masked_diffusion import LearnedMaskingModel, MaskedDiffusionModel
from imagewright.models.operator import TrajectoryOperator
from imagewright.models.preconditioning import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from imagewright.models.random_order import RandomOrderModel
from imagewright.models.recast import Recast
from imagewright.models.routed import RoutedMap
from imagewright.models.segments import MultistepConsistencyModel
from imagewright.models.self_conditioned import SelfConditioned
from imagewright.models.timesteps import TimestepPrecond
from imagewright.models.tokens import PixelCodec
from imagewright.models.trajectory import TrajectoryModel
from imagewright.models.vatt import VATTEncoder
from imagewright.models.vq import VQTokenizer
from imagewright.models.weighted import GuidedDenoiser
from imagewright.networks import NETWORKS, Network
from imagewright.networks.config import NetworkConfig, did_you_mean
from imagewright.networks.quantized import Quantized, empty
from imagewright.shapes import misfit
from imagewright.types import UserError

T = TypeVar("T", bound=nn.Module)
MODELS: dict[str, type[nn.Module]] = {
    "AccelerationFlow": AccelerationFlow,
    "AlignedFlowMap": AlignedFlowMap,
    "BitDenoiser": BitDenoiser,
    "CausalTokenModel": CausalTokenModel,
    "Classifier": Classifier,
    "ConsistencyModel": ConsistencyModel,
    "ContinuousConsistencyModel": ContinuousConsistencyModel,
    "CoupledConsistencyModel": CoupledConsistencyModel,
    "EDM2Precond": EDM2Precond,
    "EDMFlow": EDMFlow,
    "EDMPrecond": EDMPrecond,
    "EventEncoder": EventEncoder,
    "FewStepGenerator": FewStepGenerator,
    "GaussianAutoencoder": GaussianAutoencoder,
    "GuidedDenoiser": GuidedDenoiser,
    "ImageText": ImageText,
    "InLatents": InLatents,
    "InitialVelocity": InitialVelocity,
    "LatentDenoiser": LatentDenoiser,
    "LatentSpace": LatentSpace,
    "LearnedMaskingModel": LearnedMaskingModel,
    "MaskedDiffusionModel": MaskedDiffusionModel,
    "MaskedTokenModel": MaskedTokenModel,
    "MultistepConsistencyModel": MultistepConsistencyModel,
    "PixelCodec": PixelCodec,
    "RandomOrderModel": RandomOrderModel,
    "Recast": Recast,
    "RoutedMap": RoutedMap,
    "SelfConditioned": SelfConditioned,
    "TimestepPrecond": TimestepPrecond,
    "TrajectoryModel": TrajectoryModel,
    "TrajectoryOperator": TrajectoryOperator,
    "VATTEncoder": VATTEncoder,
    "VEFlow": VEFlow,
    "VEPrecond": VEPrecond,
    "VPFlow": VPFlow,
    "VPPrecond": VPPrecond,
    "VQTokenizer": VQTokenizer,
    "VelocityFlow": VelocityFlow,
    "iDDPMPrecond": iDDPMPrecond,
}
"""Every model by its name in descriptions. Its `describe()` has to return its constructor's arguments."""


def describe(module: nn.Module) -> dict[str, Any]:
    """The description of a model or network: plain JSON values, infinity written as "inf".

    Raises TypeError when the module has no `describe` method.
    """
    method = getattr(module, "describe", None)
    if method is None:
        raise TypeError(f"{type(module).__name__} cannot describe itself: it has no describe() method")
    description: dict[str, Any] = method()
    return description


def build(description: Mapping[str, Any]) -> nn.Module:
    """The freshly initialised module of a description.

    Raises UserError when the class is unknown, an argument is unknown or missing, or a value is out of range.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("class"), str):
        raise UserError(f'a model description must be an object with a "class", not {description!r}')
    arguments = dict(description)
    name = arguments.pop("class")
    if name in NETWORKS:
        return _build_network(NETWORKS[name], arguments)
    if name in MODELS:
        return _build_model(MODELS[name], arguments)
    raise UserError(f"no model or network is called {name!r}{did_you_mean(name, [*MODELS, *NETWORKS])}")


def blueprint(description: Mapping[str, Any], tensors: int) -> nn.Module:
    """The module of a description, `unbuilt`; raises UserError as `build` does."""
    return unbuilt(lambda: build(description), description, tensors)


def unbuilt(make: Callable[[], T], description: Mapping[str, Any], tensors: int) -> T:
    """A module without memory (on torch's meta device), of about so many tensors at most.

    Raises UserError where the description is of a larger one, as soon as that shows.
    """
    _require_modest(description)
    with torch.device("meta"), _no_more_than(8 * tensors + 1000):
        return make()


def _require_modest(value: Any) -> None:
    """Raise UserError for numbers and lists that no model has; loops run over some of them."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        if len(value) > limits.DESCRIBED:
            raise UserError(f"a model description has a list of {len(value)}; at most {limits.DESCRIBED} are allowed")
        for each in value:
            _require_modest(each)
    elif isinstance(value, int) and abs(value) > limits.WHOLE:
        raise UserError(f"a model description has the number {value:g}; at most {limits.WHOLE} is allowed")


@contextmanager
def _no_more_than(most: int) -> Iterator[None]:
    """Raise UserError where more modules, parameters and buffers are made."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError("it describes a larger model than the weights are of")

    hooks = [
        registry.register_module_parameter_registration_hook(note),
        registry.register_module_module_registration_hook(note),
        registry.register_module_buffer_registration_hook(note),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _build_network(network: type[Network], arguments: Mapping[str, Any]) -> nn.Module:
    told = dict(arguments)
    bits = told.pop("quantized", None)
    if list(told) != ["config"] or not isinstance(told["config"], Mapping):
        raise UserError(f'{network.__name__} is described by a "config" object alone, not by {told!r}')
    made = network(configuration(network.config_class, told["config"]))
    if bits is not None:
        if not isinstance(bits, Mapping):
            raise UserError(f'"quantized" is {bits!r}; it must be an object')
        empty(made, configuration(Quantized, bits))
    return made


def configuration(kind: type[NetworkConfig], values: Mapping[str, Any]) -> Any:
    """A network's configuration. Raises UserError for an argument that is unknown, missing, or of another type."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        fault = misfit(value, hints.get(name, Any), name)
        if fault is not None:
            raise UserError(fault)
    return kind.from_json(values)


def _build_model(model: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    parameters = inspect.signature(model).parameters
    for name in arguments:
        if name not in parameters:
            raise UserError(f"{model.__name__} has no argument {name!r}{did_you_mean(name, parameters)}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{model.__name__} needs {', '.join(missing)}")
    return model(**{name: _argument(value) for name, value in arguments.items()})


def _argument(value: Any) -> Any:
    """An argument as the constructor takes it: descriptions are built."""
    if isinstance(value, Mapping):
        return build(value)
    return [_argument(each) for each in value] if isinstance(value, list) else value
