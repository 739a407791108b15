"""Checkpoints of VCMamba (Munir et al. 2025, arXiv 2509.04669): a classifier of ImageNet at 224 pixels.

Shapes tell the sizes; pictures are normalised as the released program does it (ImageNet's mean and spread, bicubic).
The program scores the middle 224 pixels of 256; here an encoder sees all of a square picture, so that for its top-1 the
pictures have to be cut before: resized to 256, then the middle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from imagewright.interop.fitting import Source, StateDict, fitted, require_known
from imagewright.models.classifier import Classifier
from imagewright.networks.vcmamba import VCMamba, VCMambaConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NAMES = (
    (r"stem\.", "patch_embed."),
    (r"stages\.(\d)\.", lambda m: f"network.{2 * int(m[1])}."),
    (r"downs\.(\d)\.0\.", lambda m: f"network.{2 * int(m[1]) + 1}.proj."),
    (r"downs\.(\d)\.1\.", lambda m: f"network.{2 * int(m[1]) + 1}.norm."),
    (r"place$", "pos_embed"),
    (r"taught\.", "dist_head."),
)
_INNER = (
    (r"\.scale$", ".layer_scale_2"),
    (r"\.mlp\.one\.", ".mlp.fc1."),
    (r"\.mlp\.two\.", ".mlp.fc2."),
    (r"\.mlp\.middle\.", ".mlp.mid."),
    (r"\.mlp\.norms\.0\.", ".mlp.norm1."),
    (r"\.mlp\.norms\.1\.", ".mlp.mid_norm."),
    (r"\.mlp\.norms\.2\.", ".mlp.norm2."),
    (r"\.again\.", ".norm2."),
    (r"\.ssm\.enter\.", ".mamba.in_conv."),
    (r"\.ssm\.near\.", ".mamba.conv2d."),
    (r"\.ssm\.told\.", ".mamba.x_proj."),
    (r"\.ssm\.steps\.", ".mamba.dt_proj."),
    (r"\.ssm\.log_rate$", ".mamba.A_log"),
    (r"\.ssm\.skip$", ".mamba.D"),
    (r"\.ssm\.moves$", ".mamba.direction_Bs"),
    (r"\.ssm\.norm\.", ".mamba.norm."),
    (r"\.ssm\.leave\.", ".mamba.out_conv."),
)


def official_name(ours: str) -> str:
    """The name that a tensor of `VCMamba` has in the released checkpoints."""
    for pattern, official in _NAMES:
        ours = re.sub(f"^{pattern}", official, ours)
    for pattern, official in _INNER:
        ours = re.sub(pattern, official, ours)
    return ours


def from_vcmamba(state: StateDict, config: Mapping[str, Any]) -> Classifier:
    """The classifier of a released checkpoint. config: arguments of `VCMambaConfig`, as `sizes_of` finds them."""
    require_known(config, {"widths", "depths", "mamba", "img_resolution", "in_channels", "num_classes"}, "VCMamba")
    asked = VCMambaConfig.from_json({"official_compat": True, **config})

    def make() -> Classifier:
        return Classifier(VCMamba(asked), MEAN if asked.in_channels == 3 else (0.5,), STD, "bicubic")

    return fitted(make, asked.to_json(), state, _sources)


def sizes_of(state: StateDict) -> dict[str, Any]:
    """The arguments that shapes tell. Raises KeyError or ValueError for tensors of another network."""
    blocks: dict[int, set[int]] = {}
    for key in state:
        if m := re.match(r"network\.(\d+)\.(\d+)\.", key):
            blocks.setdefault(int(m[1]), set()).add(int(m[2]))
    stages = sorted(blocks)
    if stages != list(range(0, 2 * len(stages), 2)) or not stages:
        raise ValueError("its stages are not numbered 0, 2, 4, ...")
    widths = [int(state[f"network.{s}.{min(blocks[s])}.mlp.fc2.bias"].shape[0]) for s in stages]
    scanning = {key.split(".")[2] for key in state if key.startswith(f"network.{stages[-1]}.") and ".A_log" in key}
    place = state["pos_embed"].shape
    return {
        "img_resolution": int(place[-1]) * 4 * 2 ** (len(stages) - 1),
        "in_channels": int(state["patch_embed.0.weight"].shape[1]),
        "num_classes": int(state["head.weight"].shape[0]),
        "widths": widths,
        "depths": [len(blocks[s]) for s in stages],
        "mamba": len(scanning),
    }


def _sources(model: nn.Module) -> dict[str, Source]:
    return {name: Source(official_name(name.removeprefix("network."))) for name in model.state_dict()}
