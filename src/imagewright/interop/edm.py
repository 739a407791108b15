"""Checkpoints of EDM and EDM2, and of what was built on them: DMD2's generators, consistency models of sony/vct.

edm      Karras et al. 2022 (arXiv 2206.00364): VP, VE, iDDPM and EDM preconditioning around SongUNet (DDPM++, NCSN++)
         or DhariwalUNet (ADM). Keys and argument names are those of the published code. SiD's and DDO's are these.
edm2     Karras et al. 2024 (arXiv 2312.02696): EDM2UNet in EDM's wrapper, with its uncertainty.
dmd2     Yin et al. 2024 (arXiv 2405.14867): an EDM network as one-step generator.
ctm-cifar10   Kim et al. 2024 (arXiv 2310.02279): an EDM network that is told where to go, its CIFAR-10 program.
vct      Silvestri et al. 2025 (arXiv 2502.18197): a bare network of either kind as consistency model, with its encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.interop.fitting import (
    Source,
    StateDict,
    fitted,
    look_up,
    require_given,
    require_known,
    tensor_of,
)
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.coupled import CoupledConsistencyModel, Kernel
from imagewright.models.description import configuration
from imagewright.models.edm2 import EDM2Precond
from imagewright.models.generator import FewStepGenerator
from imagewright.models.preconditioning import EDMPrecond, Preconditioned, VEPrecond, VPPrecond, iDDPMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import DhariwalUNet, EDM2UNet, EDM2UNetConfig, SongUNet, UNet
from imagewright.networks.layers import fir_kernel
from imagewright.types import UserError

UNETS: dict[str, type[UNet]] = {"DhariwalUNet": DhariwalUNet, "SongUNet": SongUNet}
PRECONDITIONINGS: dict[str, tuple[type[Preconditioned], str]] = {
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


def from_edm(state: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    """An EDM checkpoint as the denoiser that its `precond_class` names."""
    precond_class, _ = _precond(config)
    return _from_edm(state, config, precond_class, precond_class)


def from_dmd2(state: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    """A generator of DMD2: EDM's keys; sigma_max is the level of its noise (conditioning_sigma)."""
    config = {"precond_class": "EDMPrecond", "sigma_min": 0.002, "sigma_max": 80.0, **config}
    return _from_edm(state, config, EDMPrecond, FewStepGenerator)


def from_ctm_cifar10(state: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    """A trajectory model of CTM's CIFAR-10 program: EDM's keys, and "_s" where ours say "_to"."""
    config = {"precond_class": "EDMPrecond", **config, "destination": True}
    return _from_edm(state, config, EDMPrecond, TrajectoryModel)


def _precond(config: Mapping[str, Any]) -> tuple[type[Preconditioned], str]:
    require_given(config, ("precond_class", "img_resolution", "img_channels"), "an EDM checkpoint")
    return look_up(PRECONDITIONINGS, config, "precond_class", "")


def _from_edm(
    state: StateDict, config: Mapping[str, Any], official: type[Preconditioned], ours: type[Preconditioned]
) -> Preconditioned:
    variance_too = official is iDDPMPrecond

    def is_constant(key: str) -> bool:
        return key.endswith(".resample_filter") or (variance_too and key == "u")

    model = fitted(
        partial(_edm_model, config, official, ours), config, state, partial(_edm_sources, "model."), is_constant
    )
    _check_constants(model, {k: tensor_of(k, v) for k, v in state.items() if is_constant(k)}, config)
    return model


def _edm_model(config: Mapping[str, Any], official: type[Preconditioned], ours: type[Preconditioned]) -> Preconditioned:
    network_class = look_up(UNETS, config, "model_type", _precond(config)[1])
    whose = f"{official.__name__} with {network_class.__name__}"
    arguments = _network_arguments(network_class)
    require_known(config, {*_WRAPPER_ARGUMENTS, *official.settings, *arguments}, whose)
    channels = config["img_channels"]
    out = 2 * channels if official is iDDPMPrecond and isinstance(channels, int) else channels
    network = _network(network_class, config, channels, out)
    return ours(network, **{name: config[name] for name in official.settings if name in config})


def _network_arguments(network_class: type[UNet]) -> set[str]:
    return {f.name for f in fields(network_class.config_class)} - set(_DERIVED)


def _network(network_class: type[UNet], config: Mapping[str, Any], in_channels: Any, out_channels: Any) -> UNet:
    arguments = {name: config[name] for name in _network_arguments(network_class) if name in config}
    arguments |= {"in_channels": in_channels, "out_channels": out_channels}
    return network_class(configuration(network_class.config_class, arguments))


def _edm_sources(prefix: str, model: nn.Module) -> dict[str, Source]:
    return {
        key: Source(prefix + key.removeprefix("network.").replace("_to.", "_s.") if key.startswith("network.") else key)
        for key in model.state_dict()
    }


def _check_constants(model: Preconditioned, found: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A constant that differs from ours shows that the configuration is not the checkpoint's."""
    kernel = fir_kernel(config.get("resample_filter", (1, 1)))
    for key, value in found.items():
        expected = model.u if key == "u" and isinstance(model, iDDPMPrecond) else kernel
        if value.shape != expected.shape or not torch.allclose(value, expected, rtol=1e-3, atol=1e-6):
            cause = "C_1, C_2 and M" if key == "u" else "resample_filter"
            raise UserError(f"the checkpoint's constant {key!r} is not the one that {cause} in config give")


# --- EDM2 ---------------------------------------------------------------------------------------------------

_EDM2_WRAPPER = ("precond_class", "img_channels", "use_fp16", "sigma_min", "sigma_max", "sigma_data", "logvar_channels")


def from_edm2(state: StateDict, config: Mapping[str, Any]) -> EDM2Precond:
    """An EDM2 checkpoint, with the range of its sampler, 0.002 to 80, unless config has another."""
    require_given(config, ("img_resolution", "img_channels", "label_dim"), "an EDM2 checkpoint")
    if config.get("precond_class", "Precond") != "Precond":
        raise UserError(f"config has precond_class {config['precond_class']!r}; EDM2's only one is 'Precond'")
    require_known(config, {*_EDM2_WRAPPER, *_edm2_arguments()}, "EDM2's Precond and UNet")
    settings = {name: config[name] for name in EDM2Precond.settings if name in config}

    def make() -> EDM2Precond:
        return EDM2Precond(_edm2_network(config, config["img_channels"]), **settings)

    return fitted(make, config, state, partial(_edm_sources, "unet."))


def _edm2_arguments() -> set[str]:
    return {*_network_arguments(EDM2UNet), "resample_filter"} - {"augment_dim", "destination", "double_norm", "weight"}


def _edm2_network(config: Mapping[str, Any], channels: Any, out_channels: Any = None) -> UNet:
    """Widths that are null are those of the first level (noise) and of the widest (embedding)."""
    if list(config.get("resample_filter", (1, 1))) != [1, 1]:
        raise UserError(f"config has resample_filter {config['resample_filter']!r}; every EDM2 network has [1, 1]")
    widths = config.get("channel_mult", EDM2UNetConfig.channel_mult)
    whole = isinstance(widths, list | tuple) and widths and all(isinstance(w, int) for w in widths)
    derived = {"channel_mult_noise": widths[0], "channel_mult_emb": max(widths)} if whole else {}
    given = {name: value for name, value in config.items() if value is not None or name == "clip_act"}
    return _network(EDM2UNet, derived | given, channels, channels if out_channels is None else out_channels)


# --- sony/vct -----------------------------------------------------------------------------------------------

_VCT_WRAPPER = ("network", "img_channels", "kernel", "sigma_min", "sigma_max", "sigma_data", "encoder")
_VCT_NETWORKS: dict[str, type[UNet]] = {
    "ddpmpp": SongUNet,
    "ncsnpp": SongUNet,
    "adm": DhariwalUNet,
    "edm2": EDM2UNet,
}


_VCT_KERNELS: dict[str, Kernel] = {"ve": "ve", "cot": "li"}


def from_vct(state: StateDict, config: Mapping[str, Any]) -> ConsistencyModel:
    """A consistency model of sony/vct: config is {"network": its name, **its arguments}, with the encoder's below it.

    The kernel is not in the file; "ve" is taken unless config says "cot".
    """
    require_given(config, ("network", "img_resolution", "img_channels"), "a vct checkpoint")
    kernel = look_up(_VCT_KERNELS, config, "kernel", "ve")
    network_class = look_up(_VCT_NETWORKS, config, "network", "")
    arguments = _edm2_arguments() if network_class is EDM2UNet else _network_arguments(network_class)
    require_known(config, {*_VCT_WRAPPER, *arguments}, f"vct's {network_class.__name__}")
    settings = {name: config[name] for name in ("sigma_min", "sigma_max", "sigma_data") if name in config}

    def network(own: Mapping[str, Any], out_channels: Any) -> UNet:
        own = {name: value for name, value in own.items() if name not in _VCT_WRAPPER}
        if network_class is EDM2UNet:
            return _edm2_network(own, config["img_channels"], out_channels)
        return _network(network_class, own, config["img_channels"], out_channels)

    def make() -> ConsistencyModel:
        channels, encoder = config["img_channels"], config.get("encoder")
        plain = network(config, channels)
        if encoder is None and kernel == "ve":
            return ConsistencyModel(plain, **settings)
        times = {name.replace("sigma_m", "time_m"): value for name, value in settings.items()}
        coder = None if encoder is None else network(encoder, 2 * channels)
        return CoupledConsistencyModel(plain, **times, kernel=kernel, encoder=coder)

    return fitted(make, config, state, partial(_edm_sources, "net."), lambda key: key.endswith(".resample_filter"))
