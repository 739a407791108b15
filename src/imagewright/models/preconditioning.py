"""Denoisers made of a network and a preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

Source   Karras et al. 2022 (arXiv 2206.00364), equation 7 and table 1, row by row:

           c_skip               c_out                    c_in                  c_noise
    VP     1                    -sigma                   1/sqrt(sigma^2+1)     (M - 1) t(sigma)
    VE     1                    sigma                    1                     ln(sigma / 2)
    iDDPM  1                    -sigma                   1/sqrt(sigma^2+1)     M - 1 - argmin_j |u_j - sigma|
    EDM    sd^2/(sigma^2+sd^2)  sigma sd/sqrt(sigma^2+sd^2)  1/sqrt(sigma^2+sd^2)  ln(sigma) / 4

Departs     The EDM row's default range of noise levels is 0.002 to 80, that of its grids, where the official class says
            0 to infinity; what is imported gets the same.
Precision   The affine part is computed in float32 whatever the network runs in (autocast, half precision),
            and in float64 for a network whose parameters are float64.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.errors import an
from imagewright.types import UNCONDITIONAL, Condition, UserError

NoiseLabel = Literal["log", "angle", "time"]


class Describable(Protocol):
    """What can say of itself, as JSON, how it is built; see `models.description`."""

    def describe(self) -> dict[str, Any]: ...


@runtime_checkable
class Adjustable(Protocol):
    """A network of which there is a copy with other settings; `networks.UNet` is one."""

    def with_settings(self, **settings: Any) -> nn.Module: ...


class Scalings(NamedTuple):
    """The four factors at given noise levels, each [N]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioned(nn.Module, ABC):
    """Base of the four: a `Denoiser` around `network(x, noise_label, cond)`.

    `settings` names the constructor's arguments other than the network; attributes have the same names.
    """

    settings: ClassVar[tuple[str, ...]]
    sigma_min: float
    sigma_max: float

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @abstractmethod
    def scalings(self, sigma: Tensor) -> Scalings:
        """sigma: [N], > 0. Returns the row of table 1 at each, in sigma's dtype."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x: [N, C, H, W]; sigma: [N], or one number for all images. Returns the estimate of x0, dtype of x.

        Raises ValueError when sigma has another shape.
        """
        return self.through(self.network, x, sigma, cond)

    def through(
        self, network: Callable[[Tensor, Tensor, Condition], Tensor], x: Tensor, sigma: Tensor, cond: Condition
    ) -> Tensor:
        """`forward` with another function of (x, noise_label, cond) in the network's place."""
        parameter = next(self.network.parameters(), None)
        network_dtype = torch.float32 if parameter is None else parameter.dtype
        dtype = torch.promote_types(network_dtype, torch.float32)
        image = x.to(dtype)
        s = self.scalings(_per_image(sigma, x.shape[0]).to(dtype))  # len(x) would fix the batch of an exported graph
        output = network((_column(s.c_in) * image).to(network_dtype), s.c_noise, cond)
        # A network that also predicts a variance (iDDPM) has it in the channels behind the image's.
        output = output[:, : x.shape[1]].to(dtype)
        denoised: Tensor = _column(s.c_skip) * image + _column(s.c_out) * output
        return denoised.to(x.dtype)

    def informed(self, network: Any, cond: Condition) -> Any:
        """A network like the model's, with what the model puts into it for a condition; most put nothing."""
        return network

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise level that the denoiser knows: sigma itself, unless there is a table."""
        return torch.as_tensor(sigma)

    def describe(self) -> dict[str, Any]:
        """JSON from which `models.description.build` makes the same model again, without its weights."""
        own = {name: _json_number(getattr(self, name)) for name in self.settings}
        network = cast(Describable, self.network).describe()
        return {"class": type(self).__name__, **own, "network": network}


class EDMPrecond(Preconditioned):
    """Unit variance of the network's input and target at every sigma, for data of deviation sigma_data.

    noise_label: how the network is told sigma: "log", ln(sigma) / 4; "angle", TrigFlow's time arctan(sigma / sd); or
    "time", that of the straight path, sigma / (sigma + sd).
    Raises UserError unless 0 <= sigma_min < sigma_max, sigma_data > 0 and the label is one of the three.
    """

    settings: ClassVar[tuple[str, ...]] = ("sigma_min", "sigma_max", "sigma_data", "noise_label")

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
    ) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max = _checked_range(sigma_min, sigma_max)
        self.sigma_data = _positive("sigma_data", sigma_data)
        if noise_label not in get_args(NoiseLabel):
            raise UserError(f"noise_label is {noise_label!r}; allowed: {', '.join(get_args(NoiseLabel))}")
        self.noise_label = noise_label

    def scalings(self, sigma: Tensor) -> Scalings:
        return edm_row(sigma, self.sigma_data)._replace(c_noise=self.c_noise(sigma))

    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network is told of a noise level."""
        if self.noise_label == "log":
            return sigma.log() / 4
        return torch.atan(sigma / self.sigma_data) if self.noise_label == "angle" else sigma / (sigma + self.sigma_data)


def edm_row(sigma: Tensor, sigma_data: float) -> Scalings:
    """EDM's factors at noise levels [N], the label ln(sigma) / 4."""
    total = sigma**2 + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )


class VPPrecond(Preconditioned):
    """A network trained on eps under the variance-preserving SDE with linear beta(t) = beta_min + beta_d t.

    M: number of steps of the discrete-time formulation; epsilon_t: smallest time of training.
    """

    settings: ClassVar[tuple[str, ...]] = ("beta_d", "beta_min", "M", "epsilon_t")

    def __init__(
        self,
        network: nn.Module,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
    ) -> None:
        super().__init__(network)
        self.beta_d = _positive("beta_d", beta_d)
        self.beta_min = _positive("beta_min", beta_min)
        self.epsilon_t = _positive("epsilon_t", epsilon_t)
        self.M = _steps(M)
        # In float32 on purpose: rounding moves sigma_min by 2 %, and the published results used that.
        # On the CPU always, also of a model that is only planned.
        self.sigma_min, self.sigma_max = self.sigma(torch.tensor([self.epsilon_t, 1.0], device="cpu")).tolist()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of a time in [0, 1]: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Time of a noise level, the inverse of `sigma`."""
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def scalings(self, sigma: Tensor) -> Scalings:
        return Scalings(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=1 / (sigma**2 + 1).sqrt(),
            c_noise=(self.M - 1) * self.sigma_inv(sigma),
        )


class VEPrecond(Preconditioned):
    """A network trained on the score under the variance-exploding SDE (NCSN++)."""

    settings = ("sigma_min", "sigma_max")

    def __init__(self, network: nn.Module, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__(network)
        self.sigma_min, self.sigma_max = _checked_range(sigma_min, sigma_max)

    def scalings(self, sigma: Tensor) -> Scalings:
        one = torch.ones_like(sigma)
        return Scalings(c_skip=one, c_out=sigma, c_in=one, c_noise=(0.5 * sigma).log())


class iDDPMPrecond(Preconditioned):
    """A network trained on eps at the M steps of the cosine schedule; channels beyond the image's are unused.

    C_1, C_2: adjustment of the schedule at low and high noise levels. The noise levels are the table `u`,
    [M + 1], falling to u[M] = 0; the largest is sigma_max, the smallest positive one sigma_min.
    """

    settings = ("C_1", "C_2", "M")
    u: Tensor

    def __init__(self, network: nn.Module, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> None:
        super().__init__(network)
        self.C_1 = _positive("C_1", C_1)
        self.C_2 = _positive("C_2", C_2)
        self.M = _steps(M)
        self.register_buffer("u", self._table(), persistent=False)
        self.sigma_min = float(self.u[M - 1])
        self.sigma_max = float(self.u[0])

    def alpha_bar(self, j: Tensor) -> Tensor:
        """Squared signal scale at step j in [0, M]: sin(pi/2 * j / (M (C_2 + 1)))^2."""
        return (0.5 * math.pi * j / self.M / (self.C_2 + 1)).sin() ** 2

    def _table(self) -> Tensor:
        # Step by step in float32, as the published models had it: rounding adds up along the recursion.
        # On the CPU always: sigma_min and sigma_max are read from it, also of a model that is only planned.
        u, steps = torch.zeros(self.M + 1, device="cpu"), torch.arange(self.M + 1, device="cpu")
        for j in range(self.M, 0, -1):
            ratio = self.alpha_bar(steps[j - 1]) / self.alpha_bar(steps[j])
            u[j - 1] = ((u[j] ** 2 + 1) / ratio.clip(min=self.C_1) - 1).sqrt()
        return u

    def round_sigma(self, sigma: Tensor, *, return_index: bool = False) -> Tensor:
        """The nearest entry of the table, any shape, dtype of sigma; or its index, int64."""
        sigma = torch.as_tensor(sigma)
        index = (sigma.to(self.u)[..., None] - self.u).abs().argmin(-1)
        return (index if return_index else self.u[index].to(sigma.dtype)).to(sigma.device)

    def scalings(self, sigma: Tensor) -> Scalings:
        return Scalings(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=1 / (sigma**2 + 1).sqrt(),
            c_noise=self.M - 1 - self.round_sigma(sigma, return_index=True).to(sigma.dtype),
        )


def student_network(teacher: Preconditioned, dropout: float = 0.0) -> nn.Module:
    """A copy of a denoiser's network for a student to start from: the same weights, its own dropout, no hidden labels.

    The one place where students get their dropout: none unless told, whatever the teacher was trained with, as in the
    published distillations. A network that is none of the library's U-Nets keeps what it has; UserError where it is
    asked for another.
    """
    network = teacher.network
    student: nn.Module = copy.deepcopy(network)
    if isinstance(network, Adjustable):
        student = network.with_settings(dropout=dropout, label_dropout=0.0)
    elif dropout:
        raise UserError(
            f"method.dropout is {dropout}; the teacher's network, {an(type(network).__name__)}, has no dropout to set"
        )
    return student.requires_grad_(True)


def _per_image(sigma: Tensor, n: int) -> Tensor:
    if sigma.shape not in ((), (1,), (n,)):
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; it must be [{n}], one per image, or a single number")
    return sigma.expand(n)


def _column(per_image: Tensor) -> Tensor:
    return per_image[:, None, None, None]


def _checked_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = _number("sigma_min", sigma_min), _number("sigma_max", sigma_max)
    if not 0 <= low < high:
        raise UserError(f"sigma_min is {low} and sigma_max is {high}; they must satisfy 0 <= sigma_min < sigma_max")
    return low, high


def _positive(name: str, value: float) -> float:
    number = _number(name, value)
    require_positive(name, value)
    return number


def _steps(value: int) -> int:
    if not isinstance(value, int) or not 2 <= value <= 10_000:
        raise UserError(f"M is {value!r}; it must be an integer from 2 to 10000")
    return value


def _number(name: str, value: object) -> float:
    """As a float; "inf" is allowed, since JSON has no other way to write it."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r}; it must be a number") from None


def _json_number(value: float | str) -> float | str:
    return "inf" if value == math.inf else value
