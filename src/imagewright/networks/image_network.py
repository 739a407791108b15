"""What denoisers, maps and flows ask of the network inside them, whatever it is made of: a U-Net or a transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn

from imagewright.networks.config import Network
from imagewright.types import UNCONDITIONAL, Condition


class ImageNetwork(Network, ABC):
    """A network F(x; noise_label, cond) from images to images.

    Its configuration has in_channels, label_dim, augment_dim, dropout, label_dropout, destination and weight, as
    `UNetConfig` says them.
    """

    @abstractmethod
    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, in_channels, H, W]; noise_label: [N] (c_noise). Returns [N, out_channels, H, W]."""

    @abstractmethod
    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        """The vector that every block is told, [N, D]."""

    @abstractmethod
    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """What it has in its middle, [N, C', H', W']; arguments as of `forward`."""

    @abstractmethod
    def time_layers(self) -> list[nn.Module]:
        """The layers through which the noise level comes into the embedding."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """Weight of the last layer: where methods compare gradients of losses."""

    def told_destination(self) -> Self:
        """A copy that is also told where to go, and gives the same answers as this network until it is trained.

        It takes no augmentation vector: flow maps learn from images as they are.
        """
        return self.with_settings(destination=True, augment_dim=0)

    def told_weight(self) -> Self:
        """A copy that is also told the strength of guidance, and does not mind it until it is trained."""
        return self.with_settings(weight=True)

    def with_settings(self, **settings: Any) -> Self:
        """A copy whose configuration has these settings; layers that both have keep their weights."""
        changed = type(self)(replace(self.config, **settings)).to(next(self.parameters()))
        changed.load_state_dict(self.state_dict(), strict=False)
        return changed


def destination_of(cond: Condition) -> Tensor:
    """The noise label [N] of the level to go to. Raises ValueError where the condition says none."""
    if cond.destination is None:
        raise ValueError("this network goes from one noise level to another; it was not told where to go")
    return cond.destination


def weight_of(cond: Condition) -> Tensor:
    """The strength of guidance [N]. Raises ValueError where the condition says none."""
    if cond.weight is None:
        raise ValueError("this network is told the strength of guidance; it was not told any")
    return cond.weight


def innermost(network: nn.Module) -> nn.Module:
    """The network that a wrapper of networks is around, such as a self-conditioned one's; itself where it is none."""
    while not isinstance(network, Network) and isinstance(inner := getattr(network, "network", None), nn.Module):
        network = inner
    return network
