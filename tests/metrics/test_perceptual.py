"""Networks to compare images by: the shipped classifiers' maps, and LPIPS behind a stand-in for its package."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.data import open_images
from imagewright.data.pixels import from_uint8
from imagewright.methods.distances import Distance
from imagewright.metrics import digits_features, emoji_features
from imagewright.metrics.perceptual import LPIPS, VGG_FILE, EncoderMaps, perceptual_network
from imagewright.types import DataSpec, UserError

DIGITS = DataSpec(name="digits", resolution=8, channels=1, num_classes=10)
EMOJI = DataSpec(name="emoji64", resolution=64, channels=3, num_classes=9)
OTHER = DataSpec(name="cifar10-32x32", resolution=32, channels=3)


@pytest.mark.parametrize(("source", "extractor"), [("digits", digits_features), ("emoji64", emoji_features)])
def test_the_last_maps_mean_is_what_the_distance_measures(source: str, extractor: Any) -> None:
    data = open_images(source)
    pixels = data.images(np.arange(5))
    network = perceptual_network(None, data.spec)
    assert isinstance(network, EncoderMaps)
    maps = network(from_uint8(pixels))
    assert len(maps) == len(extractor().encoder.network.config.widths)
    assert all(a.shape[2] == 2 * b.shape[2] for a, b in pairwise(maps))
    torch.testing.assert_close(maps[-1].mean((2, 3)), torch.from_numpy(extractor()(pixels)[0]), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_images_and_no_weight() -> None:
    network = perceptual_network("digits", DIGITS)
    assert network is not None and not network.training
    images = torch.zeros(3, 1, 8, 8, requires_grad=True)
    Distance(kind="perceptual")(images, torch.ones(3, 1, 8, 8), network).sum().backward()
    assert images.grad is not None and (images.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_data_without_a_classifier_have_none_of_their_own() -> None:
    assert perceptual_network(None, OTHER) is None
    assert perceptual_network(None, DataSpec(name="digits", resolution=8, channels=3)) is None
    assert isinstance(perceptual_network("emoji", OTHER), EncoderMaps)


def test_bad_choices_are_told() -> None:
    with pytest.raises(
        UserError,
        match=r"features is 'alex'; allowed: digits, emoji, lpips, lpips-average, lpips-64, vgg, an encoder's run,",
    ):
        perceptual_network("alex", DIGITS)
    with pytest.raises(UserError, match=r"takes images of 1 channel"):
        perceptual_network("digits", EMOJI)


# --- LPIPS ----------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """The face of the package's network: one map, its squared difference, shape [N, 1, 1, 1]."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "vgg" and not verbose
        self.w = nn.Parameter(torch.ones(()))
        self.stage = nn.Sequential(nn.Identity(), nn.Sequential(nn.MaxPool2d(2, 2)))
        self.seen: list[torch.Size] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.seen += [a.shape, b.shape]
        return self.w * (a - b).square().mean((1, 2, 3), keepdim=True)

    def scaling_layer(self, x: Tensor) -> Tensor:
        return x / 2

    def net(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    package = ModuleType("lpips")
    package.LPIPS = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path


def test_lpips_compares_by_itself_at_224(hub: Path) -> None:
    (hub / "checkpoints").mkdir()
    (hub / "checkpoints" / VGG_FILE).touch()
    network = perceptual_network("lpips", DIGITS)
    assert isinstance(network, LPIPS)
    a, b = torch.zeros(2, 1, 8, 8, requires_grad=True), torch.full((2, 1, 8, 8), 0.5)
    distance = Distance(kind="perceptual")(a, b, network)
    torch.testing.assert_close(distance, torch.tensor([0.25, 0.25]))
    distance.sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    assert network.network.seen == [torch.Size([2, 3, 224, 224])] * 2
    assert all(not p.requires_grad for p in network.parameters())
    assert [m.shape for m in network(b)] == [torch.Size([2, 3, 224, 224])]


def test_lpips_64_compares_at_64_with_corners_on_corners(hub: Path) -> None:
    (hub / "checkpoints").mkdir()
    (hub / "checkpoints" / VGG_FILE).touch()
    network = perceptual_network("lpips-64", DIGITS)
    assert isinstance(network, LPIPS)
    ramp = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    (seen,) = network(ramp)
    torch.testing.assert_close(seen[0, 0, 0], torch.linspace(-1, 1, 64) / 2)  # the stand-in halves


@pytest.mark.parametrize(("name", "pooled"), [("lpips", 4.0), ("lpips-average", 2.5)])
def test_lpips_pools_by_maxima_or_by_means(name: str, pooled: float, hub: Path) -> None:
    (hub / "checkpoints").mkdir()
    (hub / "checkpoints" / VGG_FILE).touch()
    network = perceptual_network(name, DIGITS)
    assert isinstance(network, LPIPS)
    stage: nn.Module = network.network.stage  # type: ignore[assignment]
    assert float(stage(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))) == pooled


def test_lpips_downloads_nothing(hub: Path) -> None:
    with pytest.raises(UserError, match=rf"needs the file {hub}/checkpoints/{VGG_FILE}; fetch it once with: python"):
        perceptual_network("lpips", OTHER)


def test_lpips_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"features is 'lpips', which needs a package: pip install lpips torchvision"):
        perceptual_network("lpips", OTHER)
