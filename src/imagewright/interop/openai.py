"""Checkpoints of OpenAI's U-Net: guided-diffusion, consistency models, and CTM, which adds a second time to it.

guided-diffusion    Dhariwal and Nichol 2021 (arXiv 2105.05233): eps and a variance at numbered steps -> TimestepPrecond
consistency-models  Song et al. 2023 (arXiv 2303.01469): training_mode "edm" -> EDMPrecond, else ConsistencyModel
ctm                 Kim et al. 2024 (arXiv 2310.02279), its ImageNet-64 network -> TrajectoryModel

Config is the flags of the sampling scripts (image_size, num_channels, ...), or the arguments of UNetModel
(model_channels, attention_resolutions as factors, ...). Flags that change no output are accepted and have no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from imagewright.interop.fitting import Source, StateDict, fitted, look_up, require_given, require_known
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.description import configuration
from imagewright.models.preconditioning import EDMPrecond, Preconditioned
from imagewright.models.timesteps import Prediction, TimestepPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import ADMUNet, ADMUNetConfig
from imagewright.networks.unet import Role
from imagewright.shapes import misfit
from imagewright.types import UserError

WIDTHS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
"""channel_mult by image_size, where it is not given."""
_UNET = {
    *("image_size", "num_channels", "num_res_blocks", "num_heads", "num_heads_upsample", "num_head_channels"),
    *("attention_resolutions", "channel_mult", "dropout", "class_cond", "num_classes", "use_checkpoint"),
    *("use_scale_shift_norm", "resblock_updown", "use_fp16", "use_new_attention_order", "learn_sigma"),
    *("in_channels", "out_channels", "model_channels", "conv_resample", "dims", "attention_type"),
}
_GUIDED = {
    *("diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl", "predict_xstart"),
    *("rescale_timesteps", "rescale_learned_sigmas"),
}
_KARRAS = {"sigma_min", "sigma_max", "sigma_data", "weight_schedule", "training_mode", "rho"}
_MODES: dict[str, type[EDMPrecond]] = {
    "edm": EDMPrecond,
    "consistency_distillation": ConsistencyModel,
    "consistency_training": ConsistencyModel,
    "progdist": EDMPrecond,
}


class _Flags(TypedDict, total=False):
    """What may stand in a configuration."""

    image_size: int
    num_channels: int
    model_channels: int
    num_res_blocks: int
    num_heads: int
    num_heads_upsample: int
    num_head_channels: int
    attention_resolutions: str | list[int]
    channel_mult: str | list[int | float]
    dropout: float
    class_cond: bool
    num_classes: int | None
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    learn_sigma: bool
    in_channels: int
    out_channels: int
    diffusion_steps: int
    noise_schedule: str
    predict_xstart: bool
    rescale_timesteps: bool
    sigma_min: float
    sigma_max: float
    sigma_data: float
    training_mode: str


def _checked(config: Mapping[str, Any], known: set[str], whose: str) -> dict[str, Any]:
    """The configuration with lists for tuples. Raises UserError for an entry that is unknown or of another type."""
    require_known(config, known, whose)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    fault = misfit(listed, _Flags)
    if fault is not None:
        raise UserError(f"config of {whose}: {fault}")
    return listed


def from_guided_diffusion(state: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    """A denoiser on the steps of its schedule; learned variances are left unused."""
    config = _checked(config, _UNET | _GUIDED, "guided-diffusion")
    steps = config.get("diffusion_steps", 1000)
    schedule = config.get("noise_schedule", "linear")
    if schedule not in ("linear", "cosine") or steps < 2:
        raise UserError(f"config has noise_schedule {schedule!r} of {steps!r} steps; read are linear and cosine")
    ends = {"beta_start": 0.1 / steps, "beta_end": 20 / steps} if schedule == "linear" else {}
    told = 1000 / steps if config.get("rescale_timesteps") else 1.0
    prediction: Prediction = "sample" if config.get("predict_xstart") else "epsilon"

    def make() -> TimestepPrecond:
        network = ADMUNet(network_config(config, label_scale=told))
        return TimestepPrecond(network, schedule=schedule, steps=steps, prediction=prediction, **ends)

    return _fitted(make, config, state, new_order=bool(config.get("use_new_attention_order")))


def from_consistency_models(state: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    """The denoiser (training_mode "edm") or the consistency model (the default) of a checkpoint."""
    config = _checked(config, _UNET | _KARRAS, "the consistency models")
    return _karras(look_up(_MODES, config, "training_mode", "consistency_distillation"), state, config)


def from_ctm(state: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    """A trajectory model of the ImageNet-64 program."""
    config = _checked(config, _UNET | _KARRAS, "CTM")
    return _karras(TrajectoryModel, state, config, destination=True)


def from_openai(state: StateDict, config: Mapping[str, Any]) -> Preconditioned:
    """Whichever of the three it is: by a second time, by flags of guided-diffusion, or by a variance that comes out."""
    if "time_embed_s.0.weight" in state:
        return from_ctm(state, config)
    guided = _GUIDED & {*config} or config.get("learn_sigma")
    return (from_guided_diffusion if guided else from_consistency_models)(state, config)


def _karras(
    ours: type[EDMPrecond], state: StateDict, config: Mapping[str, Any], *, destination: bool = False
) -> Preconditioned:
    settings = {name: config[name] for name in ("sigma_min", "sigma_max", "sigma_data") if name in config}

    def make() -> EDMPrecond:
        return ours(ADMUNet(network_config(config, label_scale=1000.0, destination=destination)), **settings)

    # The kernels of these programs want q, k and v in the new order, whatever the flag says.
    return _fitted(make, config, state, new_order=True)


def _fitted(make: Any, config: Mapping[str, Any], state: StateDict, *, new_order: bool) -> Preconditioned:
    model: Preconditioned = fitted(make, config, state, partial(sources, new_order=new_order))
    return model


# --- the configuration --------------------------------------------------------------------------------------


def network_config(config: Mapping[str, Any], **more: Any) -> ADMUNetConfig:
    """The network's configuration from flags or constructor arguments."""
    require_given(config, ("image_size",), "a checkpoint of OpenAI's U-Net")
    _require_read(config)
    size, heads = config["image_size"], config.get("num_head_channels", -1)
    built = "model_channels" in config  # by the constructor's names
    width = config["model_channels"] if built else config.get("num_channels", 128)
    mults, shrink = _multiples(config, size)
    classes = config.get("num_classes") or (1000 if config.get("class_cond") else 0)
    channels = config.get("in_channels", 3)
    values = {
        "img_resolution": size,
        "in_channels": channels,
        "out_channels": config.get("out_channels", 6 if config.get("learn_sigma") else channels),
        "label_dim": classes,
        "model_channels": width // shrink,
        "noise_channels": width,
        "channel_mult": mults,
        "channel_mult_emb": 4 * shrink,
        "num_blocks": config.get("num_res_blocks", 2),
        "attn_resolutions": _attention(config, size, as_factors=built),
        "dropout": config.get("dropout", 0.0),
        "channels_per_head": None if heads == -1 else heads,
        "heads": config.get("num_heads", 1 if built else 4) if heads == -1 else 1,
        "adaptive_scale": config.get("use_scale_shift_norm", not built),
        "resampling": "block" if config.get("resblock_updown", False) else "conv",
        **more,
    }
    made: ADMUNetConfig = configuration(ADMUNetConfig, values)
    return made


def _require_read(config: Mapping[str, Any]) -> None:
    """Raise UserError for a variant that no published checkpoint has."""
    for name, only in (("num_heads_upsample", -1), ("conv_resample", True), ("dims", 2)):
        if config.get(name, only) not in (only, config.get("num_heads") if name == "num_heads_upsample" else only):
            raise UserError(f"config has {name} {config[name]!r}; read is {only!r}")


def _multiples(config: Mapping[str, Any], size: Any) -> tuple[list[int], int]:
    """channel_mult as whole numbers, and by how much the base is smaller for it."""
    given = config.get("channel_mult") or WIDTHS.get(size)
    if given is None:
        raise UserError(f"config needs channel_mult: there is none by default for image_size {size!r}")
    try:
        mults = [float(m) for m in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        raise UserError(f"config has channel_mult {given!r}; it must be numbers") from None
    shrink = 1 if all(m.is_integer() for m in mults) else 2
    return [int(shrink * m) for m in mults], shrink


def _attention(config: Mapping[str, Any], size: Any, *, as_factors: bool) -> list[int]:
    given = config.get("attention_resolutions", [] if as_factors else "16,8")
    try:
        numbers = [int(n) for n in (given.split(",") if isinstance(given, str) else given)]
        return [size // n for n in numbers] if as_factors and not isinstance(given, str) else numbers
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError(f"config has attention_resolutions {given!r}; it must be whole numbers") from None


# --- the names ----------------------------------------------------------------------------------------------

_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "affine_to": "emb_layers_s.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
_HEAD = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_layer0_to": "time_embed_s.0",
    "map_layer1_to": "time_embed_s.2",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
}


def sources(model: nn.Module, *, new_order: bool) -> dict[str, Source]:
    """The official name of every tensor of a model around an ADMUNet."""
    network: ADMUNet = model.network  # type: ignore[assignment]
    places = layer_places(network)
    found = {}
    for key in network.state_dict():
        head, _, rest = key.partition(".")
        if head in ("enc", "dec"):
            name, _, tail = rest.partition(".")
            found[f"network.{key}"] = _in_layer(network, f"{head}.{name}", places[f"{head}.{name}"], tail, new_order)
        else:
            change = torch.t if head == "map_label" else None
            found[f"network.{key}"] = Source(f"{_HEAD[head]}.{rest}", change)
    return found


def layer_places(network: ADMUNet) -> dict[str, tuple[str, str]]:
    """Where each layer's convolutions and its attention stand: by "enc.<name>" or "dec.<name>"."""
    places = {}
    for i, layer in enumerate(network._encoder):
        inner = ".0.op" if layer.role is Role.CONV and layer.resample else ".0"
        places[f"enc.{layer.name}"] = (f"input_blocks.{i}{inner}", f"input_blocks.{i}.1")
    block, depth = -1, 0
    for layer in network._decoder:
        name = f"dec.{layer.name}"
        if layer.role is Role.MERGE:
            block, depth = block + 1, 1 + _attends(network, name)
            places[name] = (f"output_blocks.{block}.0", f"output_blocks.{block}.1")
        elif layer.resample:
            inner = ".conv" if layer.role is Role.CONV else ""
            places[name] = (f"output_blocks.{block}.{depth}{inner}", "")
        else:  # the two of the lowest level, with the attention between them
            places[name] = ("middle_block.0" if layer.attention else "middle_block.2", "middle_block.1")
    return places


def _attends(network: ADMUNet, name: str) -> bool:
    return bool(getattr(network.get_submodule(name), "num_heads", 0))


def _in_layer(network: ADMUNet, name: str, place: tuple[str, str], tail: str, new_order: bool) -> Source:
    part, _, kind = tail.partition(".")
    if part in _BLOCK:
        return Source(f"{place[0]}.{_BLOCK[part]}.{kind}")
    if part not in _ATTENTION:  # a convolution by itself: the tail is "weight" or "bias"
        return Source(f"{place[0]}.{tail}")
    heads = int(getattr(network.get_submodule(name), "num_heads", 1))
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "qkv": partial(interleaved, heads=heads, new_order=new_order),
        "proj": lambda t: t[..., None] if t.ndim == 3 else t,
    }
    return Source(f"{place[1]}.{_ATTENTION[part]}.{kind}", changes.get(part))


def interleaved(t: Tensor, heads: int, new_order: bool) -> Tensor:
    """Rows of q, k and v, in blocks per head (or over all heads, new_order), as ours: alternating within a head."""
    rows = t.reshape(3, heads, -1, *t.shape[1:]) if new_order else t.reshape(heads, 3, -1, *t.shape[1:]).transpose(0, 1)
    ours = rows.permute(1, 2, 0, *range(3, rows.ndim)).reshape(t.shape)
    return ours[..., None] if t.ndim == 3 else ours
