"""The transformer of event frames: counts, what it is shown, and how patches are drawn."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from imagewright.models.event_encoder import EventEncoder
from imagewright.networks.event_vit import SIZES, EventViT, EventViTConfig, drawn, kept_count, patch_information
from imagewright.types import UserError

TINY = EventViTConfig(img_resolution=8, num_classes=3, patch=4, width=8, depth=2, heads=2)


@pytest.mark.parametrize(
    ("size", "query", "tuned"),
    [("S", 60_397_440, 22_336_360), ("B", 127_577_856, 87_139_048), ("L", 347_112_448, 305_088_488)],
)
def test_counts_are_the_official_programs(size: str, query: int, tuned: int) -> None:
    """With both heads; the predictors, the teacher's layer and the classifier that shows; and what is fine-tuned."""
    with torch.device("meta"):
        config = {"img_resolution": 224, "num_classes": 1000, **SIZES[size]}
        whole = EventEncoder(EventViT(EventViTConfig(**config, head_norm=True, learn_positions=True)), 512)
        tuning = EventViT(EventViTConfig(**config, learn_positions=True))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in whole.contrast.named_children()}
    head = 2 * SIZES[size]["width"]
    beside = {"event_predictor": 2_105_344, "image_predictor": 2_105_344, "teacher": 131_072}
    assert beside.items() <= counts.items()
    total = sum(p.numel() for p in whole.parameters())
    assert total == query + sum(beside.values()) + 1000 * head + 1000 + 2 * head
    assert sum(p.numel() for p in tuning.parameters()) == tuned


def test_patches_that_are_left_out_change_nothing_and_their_order_does_not_count() -> None:
    torch.manual_seed(0)
    network = EventViT(TINY).double().eval()
    frames = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    kept = torch.tensor([[0, 3], [2, 1]])
    tokens, patches = network.look(frames, kept)
    changed = frames.clone()
    changed[0, :, :4, 4:], changed[1, :, :4, :4] = 1, 1
    torch.testing.assert_close(network.look(changed, kept)[0], tokens)
    again = network.look(frames, kept.flip(1))
    torch.testing.assert_close(again[0], tokens)
    torch.testing.assert_close(again[1], patches.flip(1))
    every = network.look(frames, torch.tensor([[3, 2, 1, 0]] * 2))[0]
    torch.testing.assert_close(every, network.look(frames)[0])
    made = network(frames)
    assert made.pooled.shape == (2, 16) and made.tokens.shape == (2, 4, 8) and made.grid == (2, 2)
    torch.testing.assert_close(made.pooled, every.flatten(1))
    assert (tokens - every).abs().max() > 1e-3


def test_weights_begin_as_published() -> None:
    """Xavier's bounds in the transformer; PyTorch's own, 1 / sqrt(inputs), in the heads and the patches' biases."""
    torch.manual_seed(0)
    network = EventViT(replace(TINY, width=128, heads=4, patch=8, depth=1))
    encoder = EventEncoder(network, taught=64, hidden=128, out=32)
    block = network.blocks[0]
    for layer in (block.qkv, block.out, block.mlp[0], block.mlp[2]):
        most = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.98 * most < layer.weight.abs().max() <= most and not layer.bias.any()
    patches, inputs = network.patches, 2 * 8 * 8
    most = (6 / (inputs + 128)) ** 0.5
    assert 0.98 * most < patches.weight.abs().max() <= most
    assert 0.9 * inputs**-0.5 < patches.bias.abs().max() <= inputs**-0.5
    assert network.tokens.std().item() == pytest.approx(0.02, rel=0.2)
    for layer in (encoder.contrast.event[0], encoder.contrast.image_predictor[0], encoder.contrast.teacher):
        most = layer.in_features**-0.5
        assert 0.98 * most < layer.weight.abs().max() <= most and layer.bias is None


def test_later_branches_are_dropped_more_often_for_whole_frames() -> None:
    network = EventViT(replace(TINY, depth=3, drop_path=0.5))
    assert [block.drop for block in network.blocks] == [0, 0.25, 0.5]
    block, x = network.blocks[2].double(), torch.zeros(2000, 5, 8, dtype=torch.float64)
    added = block._branch(x + 1)
    dropped = (added == 0).all((1, 2))
    assert torch.equal(added[~dropped], torch.full_like(added[~dropped], 2)) and 900 < dropped.sum() < 1100
    assert torch.equal(block.eval()._branch(x + 1), x + 1)
    changed = (block.train()(x + torch.arange(8.0)) != x + torch.arange(8.0)).any(2).any(1)
    assert 400 < (~changed).sum() < 600  # a quarter: neither branch


def test_information_is_what_is_in_a_patch() -> None:
    frames = torch.full((1, 2, 8, 8), -1.0)
    frames[0, 0, 0, 5], frames[0, 1, 7, 7], frames[0, 1, 6, 6] = 0, 1, -0.5
    torch.testing.assert_close(patch_information(frames, 4), torch.tensor([[0, 0.5, 0, 1.25]]))


# --- drawing ----------------------------------------------------------------------------------------------------------

D = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
N = 40_000


def uniform(n: int = N) -> torch.Tensor:
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_inclusion_is_that_of_drawing_one_after_the_other() -> None:
    """Two of five patches, by enumeration; the published rule has another law."""
    p, wanted = (D / D.sum()).tolist(), torch.zeros(5, dtype=torch.float64)
    for a, b in itertools.permutations(range(5), 2):
        wanted[[a, b]] += p[a] * p[b] / (1 - p[a])
    given = D.expand(N, 5)
    share = {way: torch.bincount(drawn(given, 2, uniform(), way).flatten(), minlength=5) / N for way in WAYS}
    assert (share["exact"] - wanted).abs().max() < 0.01
    assert (share["published"] - wanted).abs().max() > 0.05
    assert (share["uniform"] - 0.4).abs().max() < 0.01


WAYS = ("exact", "published", "uniform")


@pytest.mark.parametrize("way", ["exact", "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patches_without_information_come_last_and_in_random_order(way: str, dtype: torch.dtype) -> None:
    given = torch.tensor([3e-30, 0, 0, 5.0, 0], dtype=dtype).expand(2000, 5)
    order = drawn(given, 5, uniform(2000).to(dtype), way)
    assert {0, 3} == set(order[:, :2].flatten().tolist())
    third = torch.bincount(order[:, 2], minlength=5)
    assert (third[[1, 2, 4]] > 500).all()
    beside = torch.cat([given, given * 1e30])  # a row counts for itself
    assert torch.equal(drawn(beside, 5, torch.cat([uniform(2000).to(dtype)] * 2), way)[:2000], order)
    empty = drawn(torch.zeros(2000, 5, dtype=dtype), 2, uniform(2000).to(dtype), way)
    assert (torch.bincount(empty.flatten(), minlength=5) > 600).all()


def test_how_many_are_kept() -> None:
    assert [kept_count(196, s) for s in (0.5, 0.25, 0.3, 1.0, 0.001)] == [98, 49, 58, 196, 1]
    assert kept_count(100, 0.29) == 29 and kept_count(10, 0.1) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"patch": 3}, "patch is 3; it must be a divisor of img_resolution, 8"),
        ({"width": 6}, "width is 6; it must be divisible by 4"),
        ({"heads": 3}, "heads is 3; it must be a divisor of width, 8"),
        ({"drop_path": 1.0}, r"drop_path is 1\.0"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_sizes_that_do_not_fit(settings: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        EventViTConfig(**{"img_resolution": 8, "patch": 4, "width": 8, "heads": 2, **settings})
