"""Checkpoints of LightningDiT's program (Yao et al. 2025, arXiv 2501.01423): DiT in all its variants -> VelocityFlow.

Config is the network's constructor's arguments. Names and shapes of the tensors tell all of them but the number of
heads of a network without rotary positions and without norms of heads, which published ones have by their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imagewright.interop.fitting import Source, StateDict, fitted, require_given, require_known, tensor_of
from imagewright.models.description import configuration
from imagewright.models.flow import VelocityFlow
from imagewright.networks import DiT, DiTConfig
from imagewright.types import UserError

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
"""Of the published networks, by width."""
_NAMES = {
    "input_size": "img_resolution", "in_channels": "in_channels", "num_classes": "label_dim", "patch_size": "patch",
    "hidden_size": "width", "depth": "depth", "num_heads": "heads", "mlp_ratio": "mlp_ratio",
    "class_dropout_prob": "label_dropout", "use_qknorm": "qk_norm", "use_swiglu": "gated", "use_rope": "rotary",
}  # fmt: skip
"""Official arguments that are ours under another name."""
_OTHERS = ("learn_sigma", "use_rmsnorm", "wo_shift", "use_checkpoint")
_DEFAULTS: dict[str, Any] = {
    "patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16, "num_classes": 1000, "class_dropout_prob": 0.1,
    "use_qknorm": False, "use_swiglu": False, "use_rope": False,
}  # fmt: skip
"""The official constructor's, where ours are others."""
_CONSTANTS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
_PLACES = {
    "into": "x_embedder.proj",
    "time.0": "t_embedder.mlp.0",
    "time.2": "t_embedder.mlp.2",
    "classes": "y_embedder.embedding_table",
    "norm": "final_layer.norm_final",
    "affine": "final_layer.adaLN_modulation.1",
    "out": "final_layer.linear",
}
_IN_BLOCK = {
    "affine": "adaLN_modulation.1",
    "norm0": "norm1",
    "norm1": "norm2",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "qk_norms.0": "attn.q_norm",
    "qk_norms.1": "attn.k_norm",
    "mlp.gate_up": "mlp.w12",
    "mlp.down": "mlp.w3",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def from_lightningdit(state: StateDict, config: Mapping[str, Any]) -> VelocityFlow:
    """A flow of LightningDiT's program, or of SiT's, whose network is the one without any of its changes."""
    require_given(config, ("input_size", "in_channels"), "a LightningDiT checkpoint")
    require_known(config, {*_NAMES, *_OTHERS}, "LightningDiT")

    def make() -> VelocityFlow:
        return VelocityFlow(DiT(network_config(config)), time_scale=1.0, from_noise=True)

    model = fitted(make, config, state, _sources, lambda key: key in _CONSTANTS)
    _check_constants(model, {key: tensor_of(key, state[key]) for key in _CONSTANTS if key in state})
    return model


def network_config(config: Mapping[str, Any]) -> DiTConfig:
    """Our configuration from the official constructor's arguments."""
    given = {**_DEFAULTS, **config}
    values = {_NAMES[name]: value for name, value in given.items() if name in _NAMES}
    channels, variance = config["in_channels"], config.get("learn_sigma", False)
    values |= {
        "out_channels": 2 * channels if variance and isinstance(channels, int) else channels,
        "norm": "rms" if config.get("use_rmsnorm", False) else "layer",
        "shift": not config.get("wo_shift", False),
    }
    made: DiTConfig = configuration(DiTConfig, values)
    return made


def told_by(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments as names and shapes of tensors tell them. Raises KeyError or ValueError."""
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    gated = "blocks.0.mlp.w12.weight" in state
    hidden = state["blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"].shape[1]
    ratio = hidden / width * (3 / 2 if gated else 1)
    told = {
        "input_size": math.isqrt(state["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len(blocks),
        "mlp_ratio": round(ratio) if hidden == int((2 / 3 if gated else 1) * round(ratio) * width) else ratio,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": state["final_layer.linear.bias"].shape[0] == 2 * channels * patch**2,
        "use_qknorm": "blocks.0.attn.q_norm.weight" in state,
        "use_swiglu": gated,
        "use_rope": "feat_rope.freqs_cos" in state,
        "use_rmsnorm": "blocks.0.norm1.weight" in state,
        "wo_shift": state["blocks.0.adaLN_modulation.1.bias"].shape[0] == 4 * width,
    }
    of_heads = [state[key].shape[-1] for key in ("feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight") if key in state]
    heads = width // of_heads[0] if of_heads else HEADS.get(width)
    return told | ({} if heads is None else {"num_heads": heads})


def _sources(model: nn.Module) -> dict[str, Source]:
    network: DiT = model.network  # type: ignore[assignment]
    return {f"network.{key}": _source(network.config, key) for key in network.state_dict()}


def _source(config: DiTConfig, key: str) -> Source:
    place, _, kind = key.rpartition(".")
    if place.startswith("blocks."):
        _, index, part = place.split(".", 2)
        return Source(f"blocks.{index}.{_IN_BLOCK[part]}.{kind}")
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "into.weight": partial(torch.flatten, start_dim=1),
        "out.weight": partial(_channels_first, pixels=config.patch**2),
        "out.bias": partial(_channels_first, pixels=config.patch**2),
    }
    return Source(f"{_PLACES[place]}.{kind}", changes.get(key))


def _channels_first(t: Tensor, pixels: int) -> Tensor:
    """Rows of a patch's numbers, channels of a pixel side by side, as ours: pixels of a channel side by side."""
    return t.unflatten(0, (pixels, -1)).transpose(0, 1).flatten(0, 1)  # type: ignore[no-any-return,no-untyped-call]


def _check_constants(model: VelocityFlow, found: Mapping[str, Tensor]) -> None:
    """A table that differs from ours shows that the configuration is not the checkpoint's."""
    network: Any = model.network
    ours = {"pos_embed": network.positions[None]}
    if network.turns is not None:
        of_a_head = network.turns[:, : network.config.width // network.config.heads // 2]
        cosine, sine = (each.repeat_interleave(2, -1) for each in of_a_head.unbind(-1))
        ours |= {"feat_rope.freqs_cos": cosine, "feat_rope.freqs_sin": sine}
    for key, value in found.items():
        if key not in ours or value.shape != ours[key].shape or not torch.allclose(value, ours[key], atol=1e-2):
            raise UserError(f"the checkpoint's table {key!r} is not that of input_size and num_heads in config")
