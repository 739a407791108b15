"""Discriminators: shapes, what the class does, what is frozen, Lipschitz bounds, and that they can learn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.networks.discriminator import ConvDiscriminator, ProjectedDiscriminator, RandomMixer
from imagewright.noise import StepNoise
from imagewright.types import Condition, UserError


class Pyramid(nn.Module):
    """Feature maps of a frozen random network: halves, quarters and eighths."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1) for c in (3, 6, 12))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = self.drop(torch.relu(conv(x)))
            maps.append(x)
        return maps


def images(n: int, channels: int, side: int) -> Tensor:
    return StepNoise(1).normal(torch.empty(n, channels, side, side))


def projected(num_classes: int = 0, size: int | None = 32) -> ProjectedDiscriminator:
    torch.manual_seed(0)
    return ProjectedDiscriminator([Pyramid(), Pyramid()], (3, 16, 16), num_classes, size=size, width=8)


@pytest.mark.parametrize(("side", "channels", "places"), [(8, 1, 16), (9, 2, 16), (16, 3, 16), (28, 1, 9), (64, 3, 16)])
def test_any_resolution_and_channels(side: int, channels: int, places: int) -> None:
    logits = ConvDiscriminator(side, channels, 5, width=4)(images(3, channels, side), Condition(label=torch.arange(3)))
    assert logits.shape == (3, places) and logits.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda n: ConvDiscriminator(16, 3, n, width=4), projected], ids=["conv", "projected"])
def test_the_class_matters_only_where_it_is_known(make) -> None:  # type: ignore[no-untyped-def]
    x, network = images(4, 3, 16), make(3).eval()

    def answer(*labels: int) -> Tensor:
        return network(x, Condition(label=torch.tensor(labels))).detach()

    assert torch.equal(answer(-1, -1, -1, -1), network(x).detach())
    one, other = answer(0, 1, 2, -1), answer(1, 1, 2, -1)
    assert not torch.equal(one[0], other[0]) and torch.equal(one[1:], other[1:])
    blind = make(0).eval()
    assert torch.equal(blind(x, Condition(label=torch.arange(4))), blind(x))


def test_every_image_is_judged_by_itself() -> None:
    x = images(4, 3, 16)
    for network in (ConvDiscriminator(16, 3, width=4).eval(), projected().eval()):
        torch.testing.assert_close(network(x)[2:3], network(x[2:3]), rtol=1e-4, atol=1e-5)


def test_convolutions_have_spectral_norm_one() -> None:
    network = ConvDiscriminator(16, 3, width=8)
    for _ in range(200):  # power iterations go on with every forward pass in training
        network(images(1, 3, 16))
    weights = [m.weight.detach().flatten(1) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 8
    for weight in weights:
        assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=1e-2)


def test_projections_stay_frozen_and_in_eval_mode() -> None:
    network = projected().train()
    assert not any(p.requires_grad for p in [*network.features.parameters(), *network.mixers.parameters()])
    assert all(p.requires_grad for p in network.heads.parameters())
    assert network.heads.training and not any(m.training for m in network.features.modules())
    x = images(2, 3, 16).requires_grad_(True)
    network(x).sum().backward()
    assert x.grad is not None and (x.grad != 0).any(1).all()  # the generator learns through the frozen networks
    assert all(p.grad is not None for p in network.heads.parameters())


def test_sizes_of_features() -> None:
    # Heads judge 5 x 5 places of 8 x 8, and one place of 4 x 4 or less; two networks.
    assert projected(size=None)(images(2, 3, 16)).shape == (2, 2 * (25 + 1 + 1))  # sides 8, 4, 2
    network = projected(size=32).eval()  # sides 16, 8, 4
    found = network(images(2, 3, 16))
    assert found.shape == (2, 2 * (25 + 25 + 1))
    network.size = None
    assert torch.equal(found, network(F.interpolate(images(2, 3, 16), size=(32, 32), mode="bilinear")))


def test_mixing_reaches_every_channel_from_its_own_and_coarser_scales() -> None:
    torch.manual_seed(1)
    mixer = RandomMixer([3, 5], 4).double()
    fine, coarse = (StepNoise(2).normal(torch.empty(s, dtype=torch.float64)) for s in ((1, 3, 8, 8), (1, 5, 4, 4)))
    before = mixer([fine, coarse])
    assert [m.shape for m in before] == [(1, 4, 8, 8), (1, 8, 4, 4)] and mixer.widths == [4, 8]
    changed = fine.clone()
    changed[0, 0] += 1
    after = mixer([changed, coarse])
    assert ((after[0] - before[0]).abs().amax((0, 2, 3)) > 1e-6).all() and torch.equal(after[1], before[1])
    after = mixer([fine, coarse + 1])
    assert all(((a - b).abs().amax((0, 2, 3)) > 1e-6).all() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("make", [lambda: ConvDiscriminator(16, 3, 2, width=8), lambda: projected(2)])
def test_it_learns_which_class_looks_how(make) -> None:  # type: ignore[no-untyped-def]
    """Real: bright images of class 1, dark ones of class 0. Fake: the other way round; only the class tells."""
    torch.manual_seed(2)
    network = make()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=5e-3, betas=(0.5, 0.9))
    label = torch.arange(32) % 2
    for step in range(60):
        x = 0.3 * StepNoise(3, step).normal(torch.empty(32, 3, 16, 16)) + (label - 0.5)[:, None, None, None]
        real, fake = network(x, Condition(label=label)), network(x, Condition(label=1 - label))
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1.0  # 2 for one that cannot tell
    assert (real.mean(1) > fake.mean(1)).float().mean() > 0.95


def test_state_makes_the_same_network_again() -> None:
    x = images(2, 3, 16)
    for network, other in ((ConvDiscriminator(16, 3, width=4), ConvDiscriminator(16, 3, width=4)),
                           (projected(), copy.deepcopy(projected()))):  # fmt: skip
        network(x)
        other.load_state_dict(network.state_dict())
        assert torch.equal(network(x), other(x)) and torch.equal(network(x), other(x))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ConvDiscriminator(7, 3), "resolution 7 and 0 classes; resolution must be at least 8"),
        (lambda: ConvDiscriminator(8, 0), "for 0 channels"),
        (lambda: ConvDiscriminator(8, 3, -1), "-1 classes"),
        (lambda: ConvDiscriminator(8, 3, width=0), "of width 0"),
        (lambda: ProjectedDiscriminator([], (3, 8, 8)), "needs at least one feature network"),
        (lambda: ProjectedDiscriminator([nn.Identity()], (3, 8, 8)), "Identity must turn images into a list of"),
    ],
)
def test_bad_settings_are_told(make, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=sentence):
        make()
