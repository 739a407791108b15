"""Own rules of forward-mode derivatives: PyTorch's values, at fewer convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from imagewright.networks import (
    DhariwalUNet,
    DhariwalUNetConfig,
    EDM2UNet,
    EDM2UNetConfig,
    SongUNet,
    SongUNetConfig,
)
from imagewright.networks.tangents import Conv2d, GroupNorm, attention, derivative, scaled

UNET: dict[str, Any] = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 64,
                        "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.0}  # fmt: skip
NETWORKS = {
    "song": lambda: SongUNet(SongUNetConfig(**UNET, double_norm=True, resample_filter=(1, 3, 3, 1))),
    "residual": lambda: SongUNet(SongUNetConfig(**UNET, encoder_type="residual", embedding_type="fourier")),
    "adm": lambda: DhariwalUNet(DhariwalUNetConfig(**UNET)),
    "edm2": lambda: EDM2UNet(EDM2UNetConfig(**UNET)),
}


def random_(module: nn.Module) -> nn.Module:
    """In double precision, with no weight at zero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.double()


def both(function: Callable[..., Tensor], *at: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    along = tuple(torch.randn_like(x) for x in at)
    theirs: Any = torch.func.jvp(function, at, along)
    return derivative(function, at, along), theirs


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_s_derivative_is_pytorch_s(name: str, channels_last: bool) -> None:
    network = random_(NETWORKS[name]()).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    ours, theirs = both(lambda x, t: network(x, t), x, torch.tensor([0.3, 0.9], dtype=torch.float64))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9 * float(other.detach().abs().max()))
    assert not ours[1].requires_grad


PARTS: dict[str, Any] = {
    "norm": random_(GroupNorm(3, 6)),
    "norm without weights": GroupNorm(3, 6, affine=False),
    "strided": random_(Conv2d(6, 4, 3, stride=2, padding=1)),
    "attention": lambda x: attention(*(x * x).flatten(2).view(2, 1, 3, 2, 16).mT.unbind(2)),
    "scaled": lambda x: scaled(x, x.mean((2, 3), keepdim=True), x.sum((2, 3), keepdim=True)),
    "scaled by constants": lambda x: scaled(x, torch.ones(6, 1, 1).double(), torch.ones(6, 1, 1).double()),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_s_derivative_is_pytorch_s(name: str) -> None:
    ours, theirs = both(PARTS[name], torch.randn(2, 6, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class Convolutions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_convolves_twice(name: str) -> None:
    network, x, t = NETWORKS[name]().eval(), torch.randn(1, 3, 8, 8), torch.ones(1)
    counts = []
    for call in (lambda: network(x, t), lambda: derivative(network, (x, t), (x, t))):
        with Convolutions() as seen, torch.no_grad():
            call()
        counts.append(seen.count)
    filters = 6 if name == "song" else 0  # of resampling, which are PyTorch's own
    assert counts[0] <= counts[1] <= 2 * counts[0] + filters


def test_a_function_that_does_not_move() -> None:
    value, change = derivative(lambda x: torch.ones_like(x.detach()), (torch.randn(3),), (torch.ones(3),))
    assert torch.equal(value, torch.ones(3)) and torch.equal(change, torch.zeros(3))
