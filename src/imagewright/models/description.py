"""Models as JSON: `describe` says what a module is, `build` makes it again, without its weights.

A description is {"class": name, **constructor arguments}; an argument that is itself a module is again
one. A network's only argument is its configuration: {"class": "SongUNet", "config": {...}}.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from imagewright.models.causal import CausalTokenModel
from imagewright.models.consistency import ConsistencyModel, ContinuousConsistencyModel
from imagewright.models.generator import FewStepGenerator
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.masked_diffusion import LearnedMaskingModel, MaskedDiffusionModel
from imagewright.models.preconditioning import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from imagewright.models.segments import MultistepConsistencyModel
from imagewright.models.tokens import PixelCodec
from imagewright.models.trajectory import TrajectoryModel
from imagewright.models.vq import VQTokenizer
from imagewright.networks import NETWORKS, Network
from imagewright.networks.config import did_you_mean
from imagewright.types import UserError

MODELS: dict[str, type[nn.Module]] = {
    "CausalTokenModel": CausalTokenModel,
    "ConsistencyModel": ConsistencyModel,
    "ContinuousConsistencyModel": ContinuousConsistencyModel,
    "EDMPrecond": EDMPrecond,
    "FewStepGenerator": FewStepGenerator,
    "LearnedMaskingModel": LearnedMaskingModel,
    "MaskedDiffusionModel": MaskedDiffusionModel,
    "MaskedTokenModel": MaskedTokenModel,
    "MultistepConsistencyModel": MultistepConsistencyModel,
    "PixelCodec": PixelCodec,
    "TrajectoryModel": TrajectoryModel,
    "VEPrecond": VEPrecond,
    "VPPrecond": VPPrecond,
    "VQTokenizer": VQTokenizer,
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


def _build_network(network: type[Network], arguments: Mapping[str, Any]) -> nn.Module:
    if list(arguments) != ["config"] or not isinstance(arguments["config"], Mapping):
        raise UserError(f'{network.__name__} is described by a "config" object alone, not by {dict(arguments)!r}')
    return network(network.config_class.from_json(arguments["config"]))


def _build_model(model: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    parameters = inspect.signature(model).parameters
    for name in arguments:
        if name not in parameters:
            raise UserError(f"{model.__name__} has no argument {name!r}{did_you_mean(name, parameters)}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{model.__name__} needs {', '.join(missing)}")
    return model(**{name: build(v) if isinstance(v, Mapping) else v for name, v in arguments.items()})
