"""VATT's network: the released code's numbers on the same weights, its sizes, and what may have no influence.

vatt.json: made with TensorFlow by the released code's layers and objectives (google-research, vatt), dropout left out,
on one replica; weights and inputs are those that `filled` and `shown` make.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import RBFInterpolator
from torch import Tensor

from imagewright.data.words import PAD
from imagewright.networks import vatt
from imagewright.networks.compiling import compile_network
from imagewright.networks.recompute import blocks
from imagewright.networks.vatt import SETS, VATT, VATTConfig, buckets, stretched
from imagewright.training.footprint import footprint
from imagewright.types import DataSpec, UserError

RELEASED: dict[str, Any] = json.loads((Path(__file__).parent / "vatt.json").read_text())
SIZES: dict[str, Any] = {
    "img_resolution": 4, "in_channels": 2, "frames": 4, "patch": (2, 2), "samples": 24, "piece": 8, "words": 11,
    "length": 6, "word_width": 6, "joint": (6, 4), "after": 10, "dropout": 0.0,
}  # fmt: skip
OWN = VATTConfig(**SIZES, video=(8, 2, 2), audio=(12, 1, 3), text=(8, 2, 2))
SHARED = replace(OWN, audio=OWN.video, shared=True)


def filled(config: VATTConfig) -> VATT:
    """A network whose weights are sines, in the order of their names."""
    net = VATT(config)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(net.named_parameters())):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (0.37 + 0.013 * i) + i)
            gain = "norm" in name and name.endswith("weight")
            p.copy_((0.4 * wave + (1.0 if gain else 0.0)).view(p.shape))
    return net.eval()


def shown() -> tuple[Tensor, Tensor, Tensor]:
    """Three clips; the last has no text."""

    def wave(*shape: int) -> Tensor:
        return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.61).view(shape).float()

    words = torch.tensor([[4, 7, 9, 2, 1, 1], [5, 4, 2, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    return wave(3, 2, 4, 4, 4), wave(3, 24), words


@pytest.mark.parametrize(("name", "config"), [("own", OWN), ("shared", SHARED)])
def test_numbers_of_the_released_code(name: str, config: VATTConfig) -> None:
    net, (video, audio, words) = filled(config), shown()
    with torch.no_grad():
        found = {"video": net.video(video), "audio": net.audio(audio), "text": net.text(words)}
        pooled = [h[:, 0] for h in found.values()]
        for mode in ("eval", "train"):
            joint = net.train(mode == "train").joined(*pooled)
            found |= {f"{mode}_{key}": value for key, value in joint._asdict().items()}
    assert found.keys() == RELEASED[name].keys()
    for key, value in found.items():
        # Three clips divided by their own small deviation magnify rounding.
        near = 1e-3 if key.startswith("train_video") else 5e-6
        torch.testing.assert_close(value, torch.tensor(RELEASED[name][key]), rtol=0, atol=near, msg=key)


def test_distances_are_told_apart_as_in_the_released_code() -> None:
    assert buckets(20, torch.device("cpu")).tolist() == RELEASED["buckets"]
    assert buckets(90, torch.device("cpu"))[:1].tolist() == RELEASED["buckets_far"]


# --- sizes ----------------------------------------------------------------------------------------------------


def layers(width: int, depth: int, *, t5: bool = False) -> int:
    """Of a backbone, as the released layers have them: q, k, v, o, two dense layers of four times the width, norms."""
    dense = 4 * width**2 + 2 * 4 * width**2
    biases, norm = (0, width) if t5 else (4 * width + 4 * width + width, 2 * width)
    return depth * (dense + biases + norm + 2 * width) + norm + (32 * width // 64 if t5 else 0)


def video(width: int) -> int:
    """Patches, three tables, a norm, the vector for all."""
    return (4 * 16 * 16 * 3 + 1) * width + (8 + 14 + 14) * width + 2 * width + width


def audio(width: int) -> int:
    return (128 + 1) * width + 1200 * width + 2 * width + width


def bridge(v: int, a: int, t: int) -> int:
    return v * 512 + 2 * 512 + 512 * 512 + 2 * 512 + 512 * 256 + 2 * 256 + (a + 1) * 512 + (t + 1) * 256


TABLE = 65_536 * 300
TEXT = TABLE + 300 + 300 * 512 + layers(512, 6, t5=True)
FORMULAS = {
    "BBS": video(768) + 2 * layers(768, 12) + audio(768) + TEXT + bridge(768, 768, 512),
    "MBS": video(1024) + layers(1024, 12) + layers(768, 12) + audio(768) + TEXT + bridge(1024, 768, 512),
    "LBS": video(1024) + layers(1024, 24) + layers(768, 12) + audio(768) + TEXT + bridge(1024, 768, 512),
    "MA": video(1024) + audio(1024) + layers(1024, 12) + TABLE + 1024 + 16 * 1024 + 2 * 1024
    + (2 * (1024 + 1) + (300 + 1)) * 1024 + 3 * (1024 + 1) * 1024 + bridge(1024, 1024, 1024),
}  # fmt: skip
COUNTS = {"BBS": 213_538_092, "MBS": 280_566_572, "LBS": 431_721_260, "MA": 182_651_136}


@pytest.mark.parametrize("name", SETS)
def test_parameters_of_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in VATT(VATTConfig(**SETS[name])).parameters())
    assert count == FORMULAS[name] == COUNTS[name]


def test_the_papers_counts_are_those_of_backbones_beside_a_fixed_table() -> None:
    """The paper's 197, 264 and 415 M: within 2 % of ours without the words' table."""
    for name, millions in {"BBS": 197, "MBS": 264, "LBS": 415}.items():
        assert abs(COUNTS[name] - TABLE - 1e6 * millions) < 0.02e6 * millions


# --- tokens ---------------------------------------------------------------------------------------------------


def test_a_still_picture_is_one_convolution_with_the_kernel_summed_over_time() -> None:
    config = replace(OWN, frames=4, patch=(4, 2))
    entry: Any = VATT(config).double().towers["video"].entry
    picture = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    found: list[Tensor] = []
    net = VATT(config).double()
    net.towers["video"].entry.register_forward_hook(lambda _, given, made: found.append(made))  # type: ignore[union-attr]
    net.towers["video"].entry.load_state_dict(entry.state_dict())  # type: ignore[union-attr]
    net.video(picture[:, :, None].expand(-1, -1, 4, -1, -1))
    kernel = entry.weight.view(8, 2, 4, 2, 2).sum(2)
    plain = F.conv2d(picture, kernel, entry.bias, stride=2)
    torch.testing.assert_close(found[0], plain.flatten(2).mT, rtol=0, atol=1e-12)


def test_tokens_are_dropped_in_training_alone_and_never_the_one_for_all() -> None:
    net, (video, audio, _) = filled(OWN), shown()
    keep = torch.tensor([5, 1])
    assert torch.equal(net.video(video, keep), net.video(video))
    assert torch.equal(net.audio(audio, keep[1:]), net.audio(audio))
    net.train()
    assert net.video(video, keep).shape[1] == 3 and net.audio(audio, keep[1:]).shape[1] == 2
    seen: list[Tensor] = []
    tower: Any = net.towers["video"]
    whole = tower.tokens(torch.zeros(1, 8, 16), (2, 2, 2))
    part = tower.tokens(torch.zeros(1, 8, 16), (2, 2, 2), keep)
    seen += [whole, part]
    assert torch.equal(part, whole[:, [0, 6, 2]])  # with the places that they have


def test_what_is_padding_has_no_influence() -> None:
    assert vatt.PAD == PAD
    for config in (OWN, SHARED):
        net = filled(config)
        words = shown()[2]
        other = net.towers["text"].entry.weight  # type: ignore[union-attr]
        before = net.text(words)[:, 0]
        with torch.no_grad():
            other[PAD] += 1  # type: ignore[operator,index]
        torch.testing.assert_close(net.text(words)[:, 0], before)
    assert not torch.allclose(before[0], before[1])


def test_video_against_words_is_made_of_video_against_sound() -> None:
    net, pooled = filled(OWN), [torch.randn(4, k) for k in (8, 12, 8)]
    before = net.joined(*pooled)
    with torch.no_grad():
        net.bridge.video1.weight.mul_(2)
    after = net.joined(*pooled)
    assert not torch.allclose(before.video_to_text, after.video_to_text)
    torch.testing.assert_close(after.video_to_audio, 2 * before.video_to_audio - net.bridge.norm1.bias)


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_tables_are_stretched_by_the_natural_spline(count: int) -> None:
    table = torch.randn(5, 3)
    at = [(torch.arange(k) / k).numpy()[:, None].astype(np.float64) for k in (5, count)]
    spline = RBFInterpolator(at[0], table.double().numpy(), kernel="cubic", degree=1)
    torch.testing.assert_close(stretched(table, count), torch.from_numpy(spline(at[1])).float(), rtol=1e-4, atol=1e-4)
    assert stretched(table, 5) is table


def test_what_a_clip_costs_is_told_of_every_tower() -> None:
    spec = DataSpec(name="clips", resolution=4, channels=2)
    for precision in ("fp32", "bf16"):
        whole, still = (footprint(VATT(c), spec, precision) for c in (OWN, replace(OWN, samples=8)))  # type: ignore[arg-type]
        assert whole is not None and still is not None
        width, saved = 12, 2  # tokens of sound
        dense = 2 * saved * (8 * width + 12 * width**2)
        assert 0.9 * dense < whole.flops - still.flops < 1.3 * dense


def test_it_is_compiled_layer_by_layer_as_each_tower_is_asked_by_itself() -> None:
    net = filled(SHARED)
    compile_network(net)
    assert [layer._compiled_call_impl is not None for layer in blocks(net)] == [True, True]


def test_sizes_that_do_not_fit_are_told() -> None:
    for fault, change in {
        "frames is 5; it must be a multiple of 2": {"frames": 5},
        "img_resolution is 5; it must be a multiple of 2": {"img_resolution": 5},
        "samples is 25; it must be a multiple of 8": {"samples": 25},
        "shared is True; it must be false where": {"shared": True},
        "video is .*; it must be 3 positive integers": {"video": (8, 2)},
        "audio is .*; it must be a width that the heads share": {"audio": (9, 1, 2)},
        "dropout is 1": {"dropout": 1.0},
    }.items():
        with pytest.raises(UserError, match=fault):
            replace(OWN, **change)
    with pytest.raises(UserError, match="a video has 3 rows; this network takes multiples of 2"):
        filled(OWN).video(torch.zeros(1, 2, 4, 3, 4))
    with pytest.raises(UserError, match="a sound has 7 samples; this network takes multiples of 8"):
        filled(OWN).audio(torch.zeros(1, 7))
