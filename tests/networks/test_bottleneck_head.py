"""The head on a bottleneck: the published layers at 8 x 8, fewer where there are fewer places; the judging denoiser."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imagewright.bench.claims.plane import PointNetwork
from imagewright.models.judging import JudgingDenoiser
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.networks.bottleneck_head import BottleneckHead, HasBottleneck
from imagewright.noise import StepNoise
from imagewright.types import UNCONDITIONAL, Condition, UserError


def convolutions(head: BottleneckHead) -> list[tuple[int, ...]]:
    return [(m.kernel_size[0], m.stride[0], int(m.padding[0])) for m in head.layers if isinstance(m, nn.Conv2d)]


def test_the_published_head() -> None:
    """768 x 8 x 8: convolutions 4x4 of stride 2 and over all that is left, 32 groups, one logit."""
    head = BottleneckHead(768, 8)
    assert convolutions(head) == [(4, 2, 1), (4, 1, 0), (1, 1, 0)]
    assert [m.num_groups for m in head.layers if isinstance(m, nn.GroupNorm)] == [32, 32]
    assert head(torch.randn(3, 768, 8, 8)).shape == (3,)
    convolution = 768 * 768 * 16 + 768
    assert sum(p.numel() for p in head.parameters()) == 2 * (convolution + 2 * 768) + 768 + 1


@pytest.mark.parametrize(
    ("side", "kernels"),
    [
        (1, [(1, 1, 0), (1, 1, 0), (1, 1, 0)]),
        (2, [(4, 2, 1), (1, 1, 0), (1, 1, 0)]),
        (4, [(4, 2, 1), (2, 1, 0), (1, 1, 0)]),
        (7, [(4, 2, 1), (3, 1, 0), (1, 1, 0)]),
        (16, [(4, 2, 1), (4, 2, 1), (4, 1, 0), (1, 1, 0)]),
    ],
)
def test_smaller_and_larger_bottlenecks(side: int, kernels: list[tuple[int, ...]]) -> None:
    head = BottleneckHead(12, side)
    assert convolutions(head) == kernels
    maps = torch.randn(5, 12, side, side, requires_grad=True)
    logits = head(maps)
    assert logits.shape == (5,)
    logits.sum().backward()
    assert maps.grad is not None and (maps.grad.abs().sum((1, 2, 3)) > 0).all()


def test_logits_are_no_half_numbers() -> None:
    assert BottleneckHead(8, 4).bfloat16()(torch.randn(2, 8, 4, 4).bfloat16()).dtype == torch.float32


def unet(label_dim: int = 0) -> EDMPrecond:
    config = SongUNetConfig(img_resolution=16, in_channels=3, out_channels=3, label_dim=label_dim, model_channels=8,
                            channel_mult=(1, 2, 2), num_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip
    return EDMPrecond(SongUNet(config)).double()


def test_the_denoiser_is_what_it_was_and_judges_what_its_encoder_makes() -> None:
    torch.manual_seed(0)
    denoiser = unet(label_dim=3)
    judging = JudgingDenoiser.from_denoiser(denoiser, (3, 16, 16))
    x, sigma = StepNoise(0).normal(torch.empty(4, 3, 16, 16).double()), torch.tensor([0.1, 1.0, 5.0, 80.0]).double()
    cond = Condition(label=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(judging(x, sigma, cond), denoiser(x, sigma, cond))
    logits = judging.judge(x, sigma, cond)
    scaled, label = x / (sigma**2 + 0.25).sqrt()[:, None, None, None], sigma.log() / 4
    encoded, _ = denoiser.network.encode(scaled, denoiser.network.embed(label, cond))
    torch.testing.assert_close(logits, judging.head(encoded))
    logits.sum().backward()
    touched = {name for name, p in judging.named_parameters() if p.grad is not None}
    assert any(name.startswith("network.enc") for name in touched) and not any(".dec." in name for name in touched)
    assert all(p.grad is None for p in denoiser.parameters())
    assert not torch.equal(logits, judging.judge(x, sigma, UNCONDITIONAL))


def test_points_have_a_bottleneck_too() -> None:
    network = PointNetwork(16, 3)
    assert isinstance(network, HasBottleneck)
    judging = JudgingDenoiser.from_denoiser(EDMPrecond(network), (2, 1, 1))
    assert judging.judge(torch.randn(5, 2, 1, 1), torch.ones(5)).shape == (5,)


def test_a_network_without_is_refused() -> None:
    with pytest.raises(UserError, match="network is a Linear, which has no bottleneck"):
        JudgingDenoiser.from_denoiser(EDMPrecond(nn.Linear(2, 2)), (2, 1, 1))
