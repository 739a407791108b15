"""Folders of huggingface/diffusers in: `UNet2DModel` and its schedulers, without diffusers.

A pipeline folder (model_index.json, unet/, scheduler/) or a folder of the network alone (config.json and its weights; a
scheduler beside it is looked for, and DDPM's default steps are assumed where there is none).

UNet2DModel      -> ADMUNet; of its variants those that ADM has too
DDPM, DDIM, ...  -> TimestepPrecond on the scheduler's betas and prediction
CM's scheduler   -> ConsistencyModel
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from imagewright.arrays import read_tensors
from imagewright.files import read_json
from imagewright.interop.fitting import Source, fitted
from imagewright.interop.openai import interleaved
from imagewright.metrics.torch_file import read_state_dict
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.description import configuration
from imagewright.models.preconditioning import Preconditioned
from imagewright.models.timesteps import TimestepPrecond
from imagewright.networks import ADMUNet, ADMUNetConfig
from imagewright.networks.unet import Role
from imagewright.types import UserError

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}
_UP = {"UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}
_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "time_embedding_type": ("positional",),
}
"""Settings of UNet2DModel of which ADMUNet has only these."""


class _Unet(TypedDict, total=False):
    """Settings of UNet2DModel that are read."""

    _class_name: str
    sample_size: int | list[int]
    in_channels: int
    out_channels: int
    block_out_channels: list[int]
    down_block_types: list[str]
    up_block_types: list[str]
    downsample_type: str
    upsample_type: str
    downsample_padding: int
    layers_per_block: int
    time_embedding_dim: int | None
    freq_shift: int | float
    flip_sin_to_cos: bool
    dropout: float
    attention_head_dim: int | None
    norm_num_groups: int
    norm_eps: float
    resnet_time_scale_shift: str
    num_class_embeds: int | None


class _Steps(TypedDict, total=False):
    """Settings of a scheduler that are read."""

    _class_name: str
    num_train_timesteps: int
    beta_schedule: str
    beta_start: float
    beta_end: float
    prediction_type: str
    rescale_betas_zero_snr: bool
    sigma_min: float
    sigma_max: float
    sigma_data: float


def is_diffusers(folder: Path) -> bool:
    """Whether a folder says that it is diffusers'."""
    return (folder / "model_index.json").exists() or (folder / "config.json").exists()


def read_diffusers(folder: Path) -> Preconditioned:
    """The model of a folder, in eval mode, float32, on the CPU.

    Raises UserError naming the file for what is missing, damaged or of a kind that is not read.
    """
    whole = (folder / "model_index.json").exists()
    network = folder / "unet" if whole else folder
    scheduler = (folder if whole else folder.parent) / "scheduler/scheduler_config.json"
    if not whole and (folder / "scheduler_config.json").exists():
        scheduler = folder / "scheduler_config.json"
    unet: dict[str, Any] = {**read_json(network / "config.json", _Unet)}
    if unet.get("_class_name") != "UNet2DModel":
        raise UserError(f"{network / 'config.json'} is of a {unet.get('_class_name')!r}; read is UNet2DModel")
    steps: dict[str, Any] = {**read_json(scheduler, _Steps)} if whole or scheduler.exists() else {}
    state = _state(network)
    consistency = steps.get("_class_name") == "CMStochasticIterativeScheduler"
    settings = _consistency(steps) if consistency else _timesteps(steps)

    def make() -> Preconditioned:
        config = network_config(unet, label_scale=1000.0 if consistency else 1.0)
        kind: Callable[..., Preconditioned] = ConsistencyModel if consistency else TimestepPrecond
        return kind(ADMUNet(config), **settings)

    return fitted(make, unet, state, sources)


def _state(folder: Path) -> dict[str, Tensor]:
    """The weights by today's names, with q, k and v of an attention in one."""
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), folder / WEIGHTS[0])
    state = read_tensors(path) if path.suffix == ".safetensors" else read_state_dict(path)
    named = {}
    for key, tensor in state.items():
        head, _, kind = key.rpartition(".")
        stem, _, last = head.rpartition(".")
        named[f"{stem}.{_OLD_ATTENTION[last]}.{kind}" if last in _OLD_ATTENTION else key] = tensor
    for key in [key for key in named if ".to_q." in key]:
        parts = [key.replace(".to_q.", f".{part}.") for part in ("to_q", "to_k", "to_v")]
        missing = [part for part in parts if part not in named]
        if missing:
            raise UserError(f"{path} lacks {missing[0]!r}")
        three = [named.pop(part).flatten(1) if key.endswith("weight") else named.pop(part) for part in parts]
        if any(t.shape != three[0].shape for t in three):
            raise UserError(f"{path} holds a to_q, to_k and to_v of different shapes, at {key!r}")
        named[key.replace(".to_q.", ".qkv.")] = torch.cat(three)
    return named


def _consistency(steps: Mapping[str, Any]) -> dict[str, Any]:
    return {name: steps[name] for name in ("sigma_min", "sigma_max", "sigma_data") if name in steps}


def _timesteps(steps: Mapping[str, Any]) -> dict[str, Any]:
    schedule, prediction = steps.get("beta_schedule", "linear"), steps.get("prediction_type", "epsilon")
    if schedule not in SCHEDULES or prediction not in PREDICTIONS:
        raise UserError(f"the scheduler's {schedule!r} betas or {prediction!r} prediction are not read")
    if steps.get("trained_betas") is not None or steps.get("rescale_betas_zero_snr"):
        raise UserError("the scheduler has betas of its own, or rescales them; neither is read")
    return {
        "schedule": SCHEDULES[schedule],
        "steps": steps.get("num_train_timesteps", 1000),
        "beta_start": steps.get("beta_start", 1e-4),
        "beta_end": steps.get("beta_end", 0.02),
        "prediction": PREDICTIONS[prediction],
    }


# --- the configuration --------------------------------------------------------------------------------------


def network_config(unet: Mapping[str, Any], label_scale: float) -> ADMUNetConfig:
    """The network's configuration. Raises UserError for a variant that ADM does not have."""
    for name, allowed in _ONLY.items():
        if unet.get(name, allowed[0]) not in allowed:
            raise UserError(f"the network has {name} {unet[name]!r}; read is {allowed[0]!r}")
    widths = unet.get("block_out_channels", [224, 448, 672, 896])
    down, up = unet.get("down_block_types"), unet.get("up_block_types")
    if not all(isinstance(v, list) and v and len(v) == len(widths) for v in (widths, down, up)):
        raise UserError("the network's block_out_channels and block types are no lists of one length")
    assert isinstance(down, list) and isinstance(up, list)
    for kind in (*down, *up):
        if not isinstance(kind, str) or kind not in {**_DOWN, **_UP}:
            raise UserError(f"the network has a block {kind!r}; read are {', '.join({**_DOWN, **_UP})}")
    attends = [_DOWN.get(kind, _UP.get(kind)) for kind in down]
    if attends != [_UP.get(kind) for kind in reversed(up)]:
        raise UserError("the network attends at other levels going up than going down")
    side, resampling = unet.get("sample_size"), _resampling(unet, down, up)
    if not all(isinstance(w, int) and w > 0 for w in widths) or not isinstance(side, int):
        raise UserError("the network's block_out_channels and sample_size are no whole numbers")
    base = _divisor(widths)
    embedding = unet.get("time_embedding_dim") or 4 * widths[0]
    if not isinstance(embedding, int) or embedding % base:
        raise UserError(f"the network has time_embedding_dim {embedding!r}; read are multiples of {base}")
    heads = unet.get("attention_head_dim", 8)
    values = {
        "img_resolution": side,
        "in_channels": unet.get("in_channels", 3),
        "out_channels": unet.get("out_channels", 3),
        "label_dim": unet.get("num_class_embeds") or 0,
        "model_channels": base,
        "noise_channels": widths[0],
        "channel_mult": [w // base for w in widths],
        "channel_mult_emb": embedding // base,
        "num_blocks": unet.get("layers_per_block", 2),
        "attn_resolutions": [side >> level for level, here in enumerate(attends) if here],
        "dropout": unet.get("dropout", 0.0),
        "channels_per_head": heads,
        "adaptive_scale": unet.get("resnet_time_scale_shift", "default") == "scale_shift",
        "resampling": resampling,
        "label_scale": label_scale,
        "groups": unet.get("norm_num_groups", 32),
        "eps": unet.get("norm_eps", 1e-5),
        "sines_first": not unet.get("flip_sin_to_cos", True),
        "endpoint": unet.get("freq_shift", 0) == 1,
        "pad_behind": resampling == "conv" and unet.get("downsample_padding", 1) == 0,
    }
    made: ADMUNetConfig = configuration(ADMUNetConfig, values)
    return made


def _resampling(unet: Mapping[str, Any], down: list[str], up: list[str]) -> str:
    """What changes the resolution: the same everywhere, or it is refused."""
    kinds = set()
    for kind in (*down[:-1], *up[:-1]):
        by_name = "block" if kind.startswith("Resnet") else "conv"
        setting = "downsample_type" if kind in _DOWN else "upsample_type"
        plain = kind in ("DownBlock2D", "UpBlock2D")
        kinds.add(by_name if plain or by_name == "block" else _TYPES.get(unet.get(setting, "conv"), "other"))
    if kinds - {"block", "conv"} or len(kinds) > 1:
        raise UserError(
            "the network changes its resolution in several ways; read are all by blocks or all by convolutions"
        )
    return kinds.pop() if kinds else "conv"


_TYPES = {"conv": "conv", "resnet": "block"}


def _divisor(widths: list[int]) -> int:
    """The widest base of which every width is a multiple, no wider than the narrowest."""
    return next(base for base in range(min(widths), 0, -1) if all(w % base == 0 for w in widths))


# --- the names ----------------------------------------------------------------------------------------------

_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {"norm2": "group_norm", "qkv": "qkv", "proj": "to_out.0"}
_HEAD = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "map_label": "class_embedding",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


def sources(model: nn.Module) -> dict[str, Source]:
    """diffusers' name of every tensor of a model around an ADMUNet, q, k and v of an attention being one, "qkv"."""
    network: ADMUNet = model.network  # type: ignore[assignment]
    places = dict(_places(network))
    found = {}
    for key in network.state_dict():
        head, _, rest = key.partition(".")
        if head in ("enc", "dec"):
            name, _, tail = rest.partition(".")
            layer = network.get_submodule(f"{head}.{name}")
            found[f"network.{key}"] = _in_layer(places[f"{head}.{name}"], tail, int(getattr(layer, "num_heads", 1)))
        else:
            found[f"network.{key}"] = Source(f"{_HEAD[head]}.{rest}", torch.t if head == "map_label" else None)
    return found


def _in_layer(place: tuple[str, str], tail: str, heads: int) -> Source:
    part, _, kind = tail.partition(".")
    if part in _BLOCK:
        return Source(f"{place[0]}.{_BLOCK[part]}.{kind}")
    if part not in _ATTENTION:
        return Source(f"{place[0]}.{tail}")
    changes: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
        ("qkv", "weight"): lambda t: interleaved(t, heads, True)[..., None, None],
        ("qkv", "bias"): partial(interleaved, heads=heads, new_order=True),
        ("proj", "weight"): lambda t: t[..., None, None] if t.ndim == 2 else t,
    }
    return Source(f"{place[1]}.{_ATTENTION[part]}.{kind}", changes.get((part, kind)))


def _places(network: ADMUNet) -> Iterator[tuple[str, tuple[str, str]]]:
    """Where each layer and its attention stand."""
    level, index = 0, 0
    for layer in network._encoder:
        if layer.resample:
            yield f"enc.{layer.name}", (f"down_blocks.{level}.downsamplers.0" + _conv(layer.role), "")
            level, index = level + 1, 0
        elif layer.role is Role.CONV:
            yield f"enc.{layer.name}", ("conv_in", "")
        else:
            yield (
                f"enc.{layer.name}",
                (f"down_blocks.{level}.resnets.{index}", f"down_blocks.{level}.attentions.{index}"),
            )
            index += 1
    level, index = 0, 0
    for layer in network._decoder:
        if layer.resample:
            yield f"dec.{layer.name}", (f"up_blocks.{level}.upsamplers.0" + _conv(layer.role), "")
            level, index = level + 1, 0
        elif layer.role is Role.MERGE:
            yield f"dec.{layer.name}", (f"up_blocks.{level}.resnets.{index}", f"up_blocks.{level}.attentions.{index}")
            index += 1
        else:
            yield f"dec.{layer.name}", (f"mid_block.resnets.{0 if layer.attention else 1}", "mid_block.attentions.0")


def _conv(role: Role) -> str:
    return ".conv" if role is Role.CONV else ""
