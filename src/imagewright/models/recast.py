"""The network of any preconditioning, as EDM's asks for one: what students of denoisers need of a flow.

With the source's row k at a noise level and EDM's c (`preconditioning`), both denoisers are one where
F'(u; ln(sigma) / 4) = (k_skip - c_skip) / (c_in c_out) u + k_out / c_out F(k_in / c_in u; k_noise).

A student that starts from F' has the source's weights; its own wrapper may be another than EDM's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.preconditioning import EDMPrecond, Preconditioned, edm_row
from imagewright.models.weighted import told_weight
from imagewright.precision import wide
from imagewright.types import UNCONDITIONAL, Condition, UserError

Ask = Callable[[Tensor, Tensor, Condition], Tensor]


class Recast(nn.Module):
    """F' of a source. sigma_data: of EDM's preconditioning around it; the noise label is the logarithm's."""

    def __init__(self, source: Preconditioned, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not knows_every_level(source):
            raise UserError(f"source is {an(type(source).__name__)}, which knows a table of noise levels alone")
        self.source, self.sigma_data = source, float(sigma_data)

    @property
    def network(self) -> nn.Module:
        """F."""
        return self.source.network

    @property
    def config(self) -> Any:
        """Of F."""
        return self.network.config

    @property
    def last_layer(self) -> nn.Parameter:
        """As `networks.UNet.last_layer`."""
        return cast(nn.Parameter, self.network.last_layer)

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `networks.UNet.forward`."""
        return self.through(self.network, x, noise_label, cond)

    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `networks.UNet.bottleneck`."""
        network: Any = self.network
        found: Tensor = network.bottleneck(*self._translated(x, noise_label, cond))
        return found

    def through(self, network: Ask, x: Tensor, noise_label: Tensor, cond: Condition) -> Tensor:
        """`forward` with another function of (x, noise_label, cond) in F's place."""
        ours, theirs = self._rows(noise_label)
        answer = network(*self._translated(x, noise_label, cond))[:, : x.shape[1]]
        stays = (theirs.c_skip - ours.c_skip) / (ours.c_in * ours.c_out)
        counts = theirs.c_out / ours.c_out
        dtype = torch.promote_types(x.dtype, torch.float32)
        made: Tensor = _column(stays, dtype) * x.to(dtype) + _column(counts, dtype) * answer.to(dtype)
        return made.to(x.dtype)

    def with_settings(self, **settings: Any) -> Self:
        """As `networks.UNet.with_settings`."""
        return self._around(cast(Any, self.network).with_settings(**settings))

    def told_destination(self) -> Self:
        """As `networks.UNet.told_destination`."""
        return self._around(cast(Any, self.network).told_destination())

    def told_weight(self) -> Self:
        """As `networks.UNet.told_weight`."""
        return self._around(told_weight(self.network))

    def describe(self) -> dict[str, Any]:
        """As `Preconditioned.describe`."""
        return {"class": type(self).__name__, "source": self.source.describe(), "sigma_data": self.sigma_data}

    def _around(self, network: nn.Module) -> Self:
        source = copy.copy(self.source)
        source._modules = {**self.source._modules, "network": network}
        return type(self)(source, self.sigma_data).train(self.training)

    def _rows(self, noise_label: Tensor) -> tuple[Any, Any]:
        """EDM's factors and the source's, in float64: their difference keeps its digits near clean images."""
        sigma = torch.exp(4 * wide(noise_label))
        return edm_row(sigma, self.sigma_data), self.source.scalings(sigma)

    def _translated(self, x: Tensor, noise_label: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Condition]:
        ours, theirs = self._rows(noise_label)
        dtype = torch.promote_types(noise_label.dtype, torch.float32)
        if cond.destination is not None:
            cond = replace(cond, destination=self._rows(cond.destination)[1].c_noise.to(dtype))
        return _column(theirs.c_in / ours.c_in, x.dtype) * x, theirs.c_noise.to(dtype), cond


def knows_every_level(denoiser: Preconditioned) -> bool:
    """Whether it answers at any noise level, not at those of a table alone."""
    return type(denoiser).round_sigma is Preconditioned.round_sigma


def recast(denoiser: Preconditioned) -> EDMPrecond:
    """The same denoiser with EDM's preconditioning, its network not copied; over what it knows of EDM's range."""
    low, high = max(0.002, denoiser.sigma_min), min(80.0, denoiser.sigma_max)
    return EDMPrecond(Recast(denoiser), low, high).train(denoiser.training)


def _column(per_image: Tensor, dtype: torch.dtype) -> Tensor:
    return per_image.to(dtype)[:, None, None, None]
