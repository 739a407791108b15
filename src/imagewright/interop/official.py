"""Official checkpoints in: a state dict and the constructor's arguments make one of our denoisers.

kind "edm"   Karras et al. 2022 (arXiv 2206.00364): VP, VE, iDDPM and EDM preconditioning around SongUNet
             (DDPM++, NCSN++) or DhariwalUNet (ADM). Keys and argument names are those of its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.models.description import configuration, unbuilt
from imagewright.models.preconditioning import EDMPrecond, Preconditioned, VEPrecond, VPPrecond, iDDPMPrecond
from imagewright.networks import NETWORKS, UNet
from imagewright.networks.config import did_you_mean
from imagewright.networks.layers import fir_kernel
from imagewright.shapes import brief
from imagewright.types import UserError

StateDict = Mapping[str, Tensor | np.ndarray[Any, Any]]

T = TypeVar("T")

_SHOWN = 10
"""How many keys an error sentence lists."""


def from_official(state_dict: StateDict, kind: str, config: Mapping[str, Any]) -> Preconditioned:
    """The denoiser of an official checkpoint, in eval mode, float32, on the CPU.

    state_dict: tensors or arrays by official key; constant buffers may be absent.
    kind:   a family of checkpoints, see KINDS.
    config: {"precond_class": name, **arguments of its constructor}, as in the checkpoint's `init_kwargs`.

    Raises UserError naming what is unknown, missing, surplus, or of the wrong shape.
    """
    if kind not in KINDS:
        raise UserError(f"no kind of official checkpoint is called {kind!r}{did_you_mean(kind, KINDS)}")
    return KINDS[kind](state_dict, config)


# --- EDM ----------------------------------------------------------------------------------------------------

_UNETS = {name: network for name, network in NETWORKS.items() if issubclass(network, UNet)}
_PRECONDITIONINGS: dict[str, tuple[type[Preconditioned], str]] = {
    "VPPrecond": (VPPrecond, "SongUNet"),
    "VEPrecond": (VEPrecond, "SongUNet"),
    "iDDPMPrecond": (iDDPMPrecond, "DhariwalUNet"),
    "EDMPrecond": (EDMPrecond, "DhariwalUNet"),
}
"""By official name: our class and its default network.

The noise range is the one that each published model is sampled in: that of the class (VP's and iDDPM's from their
schedules, VE's 0.02 to 100), and for EDM, whose official class says [0, inf], that of its sampler, 0.002 to 80. A model
trained for another range has to say so in its config.
"""

# What the wrapper takes for itself. `use_fp16` is accepted and has no effect: autocast sets the precision.
_WRAPPER_ARGUMENTS = ("precond_class", "model_type", "img_channels", "use_fp16")
_DERIVED = ("in_channels", "out_channels")


def _from_edm(state_dict: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    tensors = {key: _tensor(key, value) for key, value in state_dict.items()}
    # First without memory, so that widths that the weights have not cost nothing.
    _require_fit(unbuilt(lambda: _edm_model(config), config, len(tensors)), tensors)
    model = _edm_model(config)
    constants = {k for k in tensors if _is_constant(k, model)}
    _check_constants(model, {k: tensors[k] for k in constants}, config)
    _load(model, {k: v for k, v in tensors.items() if k not in constants})
    return model.eval()


def _edm_model(config: Mapping[str, Any]) -> Preconditioned:
    for needed in ("precond_class", "img_resolution", "img_channels"):
        if needed not in config:
            raise UserError(f"config of an EDM checkpoint needs {needed}")
    precond_class, default_network = _look_up(_PRECONDITIONINGS, config, "precond_class", "")
    network_class = _look_up(_UNETS, config, "model_type", default_network)
    network_arguments = {f.name for f in fields(network_class.config_class)} - set(_DERIVED)
    known = {*_WRAPPER_ARGUMENTS, *precond_class.settings, *network_arguments}
    for name in config:
        if name not in known:
            raise UserError(
                f"config has {name!r}, unknown to {precond_class.__name__} with {network_class.__name__}"
                + did_you_mean(name, known)
            )
    channels = config["img_channels"]
    variance_too = precond_class is iDDPMPrecond and isinstance(channels, int)
    arguments = {name: config[name] for name in network_arguments if name in config}
    arguments |= {"in_channels": channels, "out_channels": 2 * channels if variance_too else channels}
    network = network_class(configuration(network_class.config_class, arguments))
    settings = {name: config[name] for name in precond_class.settings if name in config}
    return precond_class(network, **settings)


def _look_up(table: Mapping[str, T], config: Mapping[str, Any], argument: str, default: str) -> T:
    name = config.get(argument, default)
    if not isinstance(name, str) or name not in table:
        raise UserError(f"config has {argument} {brief(name)}, which is unknown{did_you_mean(str(name), table)}")
    return table[name]


def _check_constants(model: Preconditioned, found: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A constant that differs from ours shows that the configuration is not the checkpoint's."""
    kernel = fir_kernel(config.get("resample_filter", (1, 1)))
    for key, value in found.items():
        expected = model.u if key == "u" and isinstance(model, iDDPMPrecond) else kernel
        if value.shape != expected.shape or not torch.allclose(value, expected, rtol=1e-3, atol=1e-6):
            cause = "C_1, C_2 and M" if key == "u" else "resample_filter"
            raise UserError(f"the checkpoint's constant {key!r} is not the one that {cause} in config give")


def _load(model: Preconditioned, tensors: Mapping[str, Tensor]) -> None:
    """Copy the weights; every key has to be there once, with the right shape."""
    _require_fit(model, tensors)
    model.load_state_dict({key: tensors[_official_key(key)] for key in model.state_dict()})


def _require_fit(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the weights are the model's, but for constants, by name and shape."""
    expected = {_official_key(key): value for key, value in model.state_dict().items()}
    complaints = [
        _list("missing", [repr(k) for k in expected if k not in tensors]),
        _list("surplus", [repr(k) for k in tensors if k not in expected and not _is_constant(k, model)]),
        _list(
            "of the wrong shape",
            [
                f"{k!r} {list(tensors[k].shape)} instead of {list(v.shape)}"
                for k, v in expected.items()
                if k in tensors and tensors[k].shape != v.shape
            ],
        ),
    ]
    if any(complaints):
        raise UserError("the state dict does not fit config: " + "; ".join(c for c in complaints if c))


def _is_constant(key: str, model: nn.Module) -> bool:
    return key.endswith(".resample_filter") or (key == "u" and isinstance(model, iDDPMPrecond))


def _official_key(key: str) -> str:
    return "model." + key.removeprefix("network.") if key.startswith("network.") else key


def _list(what: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{what}: {', '.join(items[:_SHOWN])}{more}" if items else ""


def _tensor(key: str, value: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float32)
    raise UserError(f"the state dict's {key!r} is a {type(value).__name__}; it must be a tensor or an array of numbers")


KINDS: dict[str, Callable[[StateDict, Mapping[str, Any]], Preconditioned]] = {"edm": _from_edm}
"""Every family of official checkpoints that can be read."""
