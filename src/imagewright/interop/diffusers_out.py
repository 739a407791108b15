"""A model as a diffusers pipeline folder that diffusers alone loads, and that draws the same pictures.

Exact equivalents: an ADMUNet as `UNet2DModel`, in TimestepPrecond as `DDIMPipeline`, as ConsistencyModel as
`ConsistencyModelPipeline`. What diffusers has no equal of is refused: its pipelines know neither EDM's wrapper nor the
other networks, and its DDIM no classes. A variance that a network predicts is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.files import replacing, write_text
from imagewright.interop.diffusers_in import PREDICTIONS, SCHEDULES, WEIGHTS, sources
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.timesteps import TimestepPrecond
from imagewright.networks import ADMUNet, ADMUNetConfig
from imagewright.types import UserError

VERSION = "0.32.0"
"""Of diffusers whose layout is written."""


def write_diffusers(folder: Path, model: nn.Module) -> None:
    """Write model_index.json, unet/ and scheduler/. Raises UserError where diffusers has no equal of the model."""
    network = getattr(model, "network", None)
    if not isinstance(network, ADMUNet) or type(model) not in (TimestepPrecond, ConsistencyModel):
        inside = "" if network is None else f" around {an(type(network).__name__)}"
        raise UserError(
            f"diffusers has no equal of {an(type(model).__name__)}{inside}; it has of TimestepPrecond and "
            "ConsistencyModel around an ADMUNet"
        )
    pipeline, scheduler = _scheduler(model)
    unet = {"_class_name": "UNet2DModel", "_diffusers_version": VERSION, **_unet(network.config, model)}
    index = {
        "_class_name": pipeline,
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    with replacing(folder / "unet" / WEIGHTS[0]) as aside:
        save_file(_state(model), aside, metadata={"format": "pt"})
    for name, record in (("unet/config", unet), ("scheduler/scheduler_config", scheduler), ("model_index", index)):
        write_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")


def _scheduler(model: nn.Module) -> tuple[str, dict[str, Any]]:
    if isinstance(model, TimestepPrecond):
        return "DDIMPipeline", {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": model.steps,
            "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[model.schedule],
            "beta_start": model.beta_start,
            "beta_end": model.beta_end,
            "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[model.prediction],
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
        }
    assert isinstance(model, ConsistencyModel)
    if model.noise_label != "log":
        raise UserError("diffusers' consistency models are told ln(sigma) / 4; this one is told an angle")
    return "ConsistencyModelPipeline", {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 40,
        "sigma_min": model.sigma_min,
        "sigma_max": model.sigma_max,
        "sigma_data": model.sigma_data,
        "clip_denoised": True,
    }


def _unet(config: ADMUNetConfig, model: nn.Module) -> dict[str, Any]:
    """UNet2DModel's settings. Raises UserError for what it cannot be."""
    widths = [config.model_channels * m for m in config.channel_mult]
    sides = [config.img_resolution >> level for level in range(len(widths))]
    scale = 1000.0 if isinstance(model, ConsistencyModel) else 1.0
    per_head = config.channels_per_head
    if per_head is not None and widths[-1] < per_head:
        raise UserError(f"diffusers has no network without attention at its lowest level, of {widths[-1]} channels")
    for fault, why in (
        (config.label_scale != scale, f"label_scale is {config.label_scale}; diffusers' is {scale}"),
        (config.destination, "it is told a destination"),
        (config.weight, "it is told the strength of guidance"),
        (config.double_norm, "double_norm is set"),
        (config.augment_dim, "it takes an augmentation vector"),
        (
            (config.noise_channels or config.model_channels) != widths[0],
            "its noise embedding is not of the first width",
        ),
        (per_head is None and config.heads != 1, f"its attention has {config.heads} heads of any width"),
        (config.label_dim and isinstance(model, TimestepPrecond), "its DDIMPipeline has no classes"),
    ):
        if fault:
            raise UserError(f"diffusers has no equal of this network: {why}")
    resnet = config.resampling == "block"
    attends = [side in config.attn_resolutions for side in sides]
    down = ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" if resnet else "DownBlock2D" for a in attends]
    up = ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" if resnet else "UpBlock2D" for a in reversed(attends)]
    return {
        "sample_size": config.img_resolution,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_class_embeds": config.label_dim or None,
        "block_out_channels": widths,
        "time_embedding_dim": config.model_channels * config.channel_mult_emb,
        "layers_per_block": config.num_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
        "downsample_padding": 0 if config.pad_behind else 1,
        "attention_head_dim": per_head,
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        "norm_eps": config.eps,
        "resnet_time_scale_shift": "scale_shift" if config.adaptive_scale else "default",
        "flip_sin_to_cos": not config.sines_first,
        "freq_shift": int(config.endpoint),
        "dropout": config.dropout,
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The weights under diffusers' names; q, k and v of an attention by themselves."""
    ours, theirs = model.state_dict(), {}
    for key, source in sources(model).items():
        tensor = ours[key].detach().cpu()
        if source.name.startswith("conv_out."):
            tensor = tensor[: model.network.config.in_channels]  # type: ignore[union-attr]
        if ".qkv." in source.name:
            heads: Any = model.get_submodule(key.rpartition(".qkv.")[0]).num_heads
            rows = tensor.reshape(heads, -1, 3, *tensor.shape[1:])
            for index, part in enumerate(("to_q", "to_k", "to_v")):
                theirs[source.name.replace(".qkv.", f".{part}.")] = _linear(rows[:, :, index].flatten(0, 1))
        else:
            moved = tensor.t() if source.change is not None and tensor.ndim == 2 else tensor
            theirs[source.name] = _linear(moved) if ".to_out.0." in source.name else moved.contiguous()
    return theirs


def _linear(tensor: Tensor) -> Tensor:
    """A pointwise convolution's weight as a linear layer's."""
    return (tensor.flatten(1) if tensor.ndim == 4 else tensor).contiguous()
