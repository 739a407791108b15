"""Self-conditioning: a network that is shown its own earlier answer beside the noisy image.

Source     Chen et al. 2022 (Analog Bits, arXiv 2208.04202), section 3.2.
Wrapper    `SelfConditioned(network)` takes the place of any network F(x; noise_label, cond) of twice the input
           channels, and so gives self-conditioning to whatever denoiser is built around it. `Condition.estimate` brings
           the answer, clipped here to what data can be; zeros where there is none.
Paths      Sampling, each call is shown the answer of the call before: `carried(model)` is the model for one path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.models.preconditioning import Describable
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, UserError, kind_of


class SelfConditioned(nn.Module):
    """network: of (x with the estimate behind it [N, 2 C, H, W], noise_label [N], cond), as one of x [N, C, H, W].

    bound: estimates are clipped to [-bound, bound], in the units of the data; > 0.
    """

    def __init__(self, network: nn.Module, bound: float = 1.0) -> None:
        super().__init__()
        require_positive("bound", bound)
        channels = getattr(getattr(network, "config", None), "in_channels", 2)
        if channels % 2:
            raise UserError(f"a self-conditioned network takes twice the channels; this one takes {channels}")
        self.network, self.bound = network, bound

    @property
    def config(self) -> Any:
        """The network's, with the channels that this one takes."""
        config: Any = self.network.config
        return replace(config, in_channels=config.in_channels // 2)

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, C, H, W], scaled as the network wants it; the estimate is in the units of the data."""
        if cond.estimate is None:
            estimate = torch.zeros_like(x)
        else:
            estimate, cond = cond.estimate.clamp(-self.bound, self.bound).to(x.dtype), replace(cond, estimate=None)
        answer: Tensor = self.network(torch.cat([x, estimate], dim=1), noise_label, cond)
        return answer

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        network = cast(Describable, self.network).describe()
        return {"class": type(self).__name__, "bound": self.bound, "network": network}


def is_self_conditioned(model: object) -> bool:
    """Whether there is such a network in a model, below whatever wrappers."""
    return isinstance(model, nn.Module) and any(isinstance(module, SelfConditioned) for module in model.modules())


def carried(model: Any) -> Any:
    """The model to sample one path with: itself, or of a self-conditioned denoiser a `Path` that begins here.

    A flow map that learnt from one is asked as at the beginning: it leaves its path in every call.
    """
    return Path(model) if kind_of(model) in ("denoiser", "latent_denoiser") and is_self_conditioned(model) else model


class Path:
    """A self-conditioned `Denoiser` along one path: every call is shown the answer of the call before.

    A guided denoiser is shown the guided answer, as in the official program. Not to be used for a second path.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._last: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`."""
        known = self._last if self._last is not None and self._last.shape == x.shape else None
        self._last = self._denoiser(x, sigma, replace(cond, estimate=known))
        return self._last

    def __getattr__(self, name: str) -> Any:
        """Noise levels, and what else samplers ask of a denoiser."""
        return getattr(self.__dict__["_denoiser"], name)
