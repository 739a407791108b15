"""Learn a bespoke solver for a trained model (Shaul et al. 2023, arXiv 2310.19075), algorithms 1 to 3.

    minimise over (t, t', s, s'):   E sum_i M_i d_i  >=  E |x(1) - x_n|        (an upper bound when L_tau >= Lip u)
    d_i = |x(t_i) - step_{i-1}(x(t_{i-1}))|,   M_i = product of the Lipschitz constants of the steps after node i

Ingredients   values and derivatives as independent numbers: t a normalised cumulative sum of positive increments, which
           ends at exactly 1; t' by softplus, s by exp, s' free; all start at the identity, which is the base solver bit
           for bit. True paths by an adaptive solver (the model's own field, guidance and classes included), stored
           densely, without gradients; x_aux(t_i) = x(sg t_i) + u (t_i - sg t_i), which has the path's value and its
           derivative. Every step starts from the true path, so all steps are one batch and nothing is unrolled. Adam;
           best iterate by the end-point error of real roll-outs on validation noise of its own.
Official   none was published.
Departs    true paths are a fixed pool that is gone through again and again rather than solved afresh (a few dozen
           numbers do not overfit it), kept at 128 nodes with cubic Hermite interpolation between them rather than
           solved at each t_i; DOP853 in dopri5's place; u beyond sigma_min and sigma_max is as `samplers.bespoke`
           says. The softplus is scaled to 1 at 0 and never below 1e-6; of the iterates only every `validate_every`-th,
           and the base solver, may be the best one. Classes are drawn evenly. The paper's sizes beyond n are not
           public, ours are fields. |.| is the root mean square over an image's numbers, as in the paper; the loss is
           the mean over the paths of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_positive
from imagewright.noise import StepNoise
from imagewright.paths.conversions import PathNetwork
from imagewright.precision import wide, widest
from imagewright.samplers.bespoke import Bespoke, Change, bespoke_step, identity_change, straight_velocity
from imagewright.samplers.latents_first import latents_first
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, UserError

Vary = Literal["both", "times", "scales"]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class BespokeTraining:
    """What to learn, and how."""

    num_steps: int = 5
    order: int = 2
    """1: Euler, 2: midpoint, at twice the calls."""
    vary: Vary = "both"
    """What is learnt: time and scale, or one alone while the other stays the identity (ablations)."""
    iterations: int = 2000
    batch: int = 32
    """Paths an iteration."""
    pool: int = 16
    """Batches of true paths that are solved before, and gone through in turn. Memory: 256 images a path."""
    validation: int = 4
    """Batches of fresh noise that choose the best iterate."""
    validate_every: int = 50
    lr: float = 2e-3
    L_tau: float = 1.0
    """Lipschitz constant ascribed to u; 1 in all experiments of the paper."""
    tolerance: float = 1e-5
    """Relative and absolute, of the true paths."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    """As the sampler's."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "iterations", "batch", "pool", "validation", "validate_every"):
            if getattr(self, name) < 1:
                raise UserError(f"bespoke.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "L_tau", "tolerance"):
            require_positive(f"bespoke.{name}", getattr(self, name))
        if self.vary not in ("both", "times", "scales"):
            raise UserError(f"bespoke.vary is {self.vary!r}; it must be both, times or scales")
        self.base  # noqa: B018  the sampler checks its own settings

    @property
    def base(self) -> Bespoke:
        """The solver that training starts from, its numbers written out."""
        plain = identity_change(self.order * self.num_steps)
        return Bespoke.of(plain, self.order, self.sigma_min, self.sigma_max)


@dataclass(frozen=True)
class Progress:
    """One validation: iterations done, mean of the bound since the last one (nan before any), error of roll-outs."""

    iteration: int
    loss: float
    val_rmse: float


@dataclass(frozen=True)
class BespokeResult:
    """The best solver, how training went, and the errors of the best and of the base solver on validation noise."""

    sampler: Bespoke
    history: Sequence[Progress]
    val_rmse: float
    base_rmse: float


def train_bespoke(
    denoiser: Denoiser,
    shape: Sequence[int],
    num_classes: int = 0,
    config: BespokeTraining | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    device: torch.device | str = "cpu",
) -> BespokeResult:
    """Learn a solver of `config.num_steps` steps for a denoiser (in eval mode; guided wrappers are denoisers).

    shape: of one image. num_classes: each path gets a random class; 0 is no condition. The result is never worse than
    the base solver on validation noise. Deterministic in config.seed. Raises ValueError when a path has no solution.
    """
    config = config or BespokeTraining()
    velocity = straight_velocity(denoiser, config.sigma_min, config.sigma_max)

    def paths(*key: int) -> TruePaths:
        noise, like = StepNoise(config.seed, *key), torch.empty(config.batch, *shape, device=device)
        latents = noise.normal(torch.empty(like.shape, dtype=widest(like.device))).to(like.device)
        labels = noise.integers(num_classes, torch.empty(len(like))).to(like.device) if num_classes else None
        cond = latents_first(denoiser, len(like), Condition(label=labels), noise)
        return solve_paths(velocity, latents, cond, config.tolerance)

    pool = [paths(0, k) for k in range(config.pool)]
    held = [paths(1, k) for k in range(config.validation)]
    change = ScaleTime(config, device)
    learnt = [p for p in change.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=config.lr)

    best, base_rmse = config.base, rollout_rmse(denoiser, config.base, held)
    history = [Progress(0, math.nan, base_rmse)]
    on_progress(history[0])
    least, losses = base_rmse, []
    for done in range(1, config.iterations + 1):
        loss = bespoke_loss(velocity, pool[done % len(pool)], change(), config.order, config.L_tau).mean()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break  # diverged; the best so far stands
        optimizer.zero_grad()
        loss.backward(inputs=learnt)  # type: ignore[no-untyped-call]
        optimizer.step()
        if done % config.validate_every == 0 or done == config.iterations:
            candidate = change.sampler()
            history.append(Progress(done, sum(losses) / len(losses), rollout_rmse(denoiser, candidate, held)))
            losses.clear()
            on_progress(history[-1])
            if history[-1].val_rmse < least:
                best, least = candidate, history[-1].val_rmse
    return BespokeResult(best, history, least, base_rmse)


# --- the solver's numbers ---------------------------------------------------------------------------------------------


class ScaleTime(nn.Module):
    """The learnt numbers behind a `Change`: zeros are the identity, exactly. 4 m of them, of which 4 m - 1 are free.

    One is spare because increments that grow in proportion are the same times.
    """

    def __init__(self, config: BespokeTraining, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.base = config.base
        like = torch.zeros(self.base.nfe, device=device)
        zeros = wide(like)
        times, scales = config.vary != "scales", config.vary != "times"
        self.increments = nn.Parameter(zeros.clone(), requires_grad=times)
        self.speeds = nn.Parameter(zeros.clone(), requires_grad=times)
        self.log_scales = nn.Parameter(zeros.clone(), requires_grad=scales)
        self.scales_prime = nn.Parameter(zeros.clone(), requires_grad=scales)

    def forward(self) -> Change:
        """The change, differentiable."""
        passed = _positive(self.increments).cumsum(0)
        zero, one = torch.zeros_like(passed[:1]), torch.ones_like(passed[:1])
        return Change(
            times=torch.cat([zero, passed / passed[-1]]),
            times_prime=_positive(self.speeds),
            scales=torch.cat([one, self.log_scales.exp()]),
            scales_prime=self.scales_prime,
        )

    @torch.no_grad()
    def sampler(self) -> Bespoke:
        """The solver as it stands."""
        return Bespoke.of(self(), self.base.order, self.base.sigma_min, self.base.sigma_max)


def _positive(raw: Tensor) -> Tensor:
    """A softplus that is exactly 1 at 0 and never quite 0, so that times stay apart."""
    shift, least = torch.full_like(raw, math.log(math.e - 1)), 1e-6
    return (F.softplus(raw + shift) / F.softplus(shift) + least) / (1 + least)


# --- true paths -------------------------------------------------------------------------------------------------------

NODES = 128
CLOCK = 0.1


@dataclass(frozen=True)
class TruePaths:
    """The flow's own paths of a batch, stored densely: `paths(times)` is x(t), by cubic Hermite interpolation."""

    nodes: Tensor
    """Times of what is stored, [K], from 0 to 1."""
    states: Tensor
    """x at the nodes, [K, N, ...]."""
    slopes: Tensor
    """u at the nodes, [K, N, ...]."""
    cond: Condition

    @property
    def latents(self) -> Tensor:
        """Where the paths start, [N, ...]."""
        return self.states[0]

    @property
    def ends(self) -> Tensor:
        """Where they end, [N, ...]."""
        return self.states[-1]

    def __call__(self, times: Tensor) -> Tensor:
        """x at times [k] in [0, 1]: [k, N, ...]. At a node exactly what is stored."""
        right = torch.searchsorted(self.nodes, times.contiguous()).clamp(1, len(self.nodes) - 1)
        left = right - 1
        width = self.nodes[right] - self.nodes[left]
        p = (times - self.nodes[left]) / width

        def weighted(factor: Tensor, values: Tensor, index: Tensor) -> Tensor:
            return factor.reshape(-1, *[1] * (values.ndim - 1)) * values[index]

        rise = p * p * (3 - 2 * p)
        return (
            weighted(1 - rise, self.states, left)
            + weighted(rise, self.states, right)
            + weighted(width * p * (1 - p) ** 2, self.slopes, left)
            - weighted(width * p * p * (1 - p), self.slopes, right)
        )


@torch.no_grad()
def solve_paths(
    velocity: PathNetwork, latents: Tensor, cond: Condition = UNCONDITIONAL, tolerance: float = 1e-5, nodes: int = NODES
) -> TruePaths:
    """Follow u from latents [N, ...] at t = 0 to t = 1 with SciPy's DOP853, all images together.

    nodes: how many points are kept, even on a clock like asinh sigma, close where paths bend: at the image's end.
    Raises ValueError when the integration fails.
    """
    levels = CLOCK * torch.linspace(math.asinh(80 / CLOCK), 0, nodes - 1, dtype=torch.float64).sinh()
    kept = torch.cat([levels.new_zeros(1), 1 / (1 + levels[:-1]), levels.new_ones(1)])

    def at(time: float, state: Tensor) -> Tensor:
        return velocity(state, torch.full((len(state),), time, dtype=state.dtype, device=state.device), cond)

    def slope(time: float, flat: Array) -> Array:
        state = torch.from_numpy(flat).to(latents).reshape(latents.shape)
        change: Array = at(time, state).double().flatten().cpu().numpy()
        return change

    start = latents.double().cpu().flatten().numpy()
    solution = solve_ivp(slope, (0.0, 1.0), start, method="DOP853", t_eval=kept.numpy(), rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise ValueError(f"the flow was not integrated: {solution.message}")
    states = torch.from_numpy(np.ascontiguousarray(solution.y.T)).to(latents).reshape(nodes, *latents.shape)
    slopes = torch.stack([at(float(t), x) for t, x in zip(kept, states, strict=True)])
    return TruePaths(kept.to(latents), states, slopes, cond)


def attached(velocity: PathNetwork, paths: TruePaths, times: Tensor) -> Tensor:
    """x_aux at times [n + 1], the first 0 and the last 1: the true states, with derivative u in their time.

    Differentiates neither the solver nor the interpolation. Returns [n + 1, N, ...].
    """
    fixed = times.detach()
    states = paths(fixed)
    with torch.no_grad():
        # The ends are constants, and need no derivative.
        inner = states[1:-1].flatten(0, 1)
        at = fixed[1:-1].repeat_interleave(states.shape[1])
        slopes = velocity(inner, at, _repeated(paths.cond, len(times) - 2)) if len(inner) else inner
    moved = (times - fixed)[1:-1].reshape(-1, *[1] * (states.ndim - 1)) * slopes.reshape(states[1:-1].shape)
    return torch.cat([states[:1], states[1:-1] + moved, states[-1:]])


# --- the bound --------------------------------------------------------------------------------------------------------


def step_lipschitz(change: Change, order: int, L_tau: float) -> Tensor:
    """Lipschitz constant of each step, [n], for a velocity with constant L_tau.

    With L(r) = |s'_r| / s_r + t'_r L_tau: (s_i / s_{i+1}) (1 + h L(r_i)) for order 1,
    (s_i / s_{i+1}) (1 + h L(r_{i+1/2}) (1 + (h / 2) L(r_i))) for order 2.
    """
    h = order / len(change.times_prime)
    field = change.scales_prime.abs() / change.scales[:-1] + change.times_prime * L_tau
    ratio = change.scales[:-1:order] / change.scales[order::order]
    if order == 1:
        return ratio * (1 + h * field)
    return ratio * (1 + h * field[1::2] * (1 + h / 2 * field[::2]))


def error_weights(change: Change, order: int, L_tau: float) -> Tensor:
    """M_1 .. M_n, [n]: how much an error made on arriving at node i can have grown at the end; M_n = 1."""
    steps = step_lipschitz(change, order, L_tau)
    later = torch.cat([steps[1:], torch.ones_like(steps[:1])])
    return later.flip(0).cumprod(0).flip(0)


def bespoke_loss(velocity: PathNetwork, paths: TruePaths, change: Change, order: int, L_tau: float) -> Tensor:
    """sum_i M_i d_i of each path, [N], differentiable in the change."""
    states = attached(velocity, paths, change.times[::order])
    steps, count = len(states) - 1, states.shape[1]
    index = torch.arange(steps, device=states.device).repeat_interleave(count)
    cond = _repeated(paths.cond, steps)
    arrived, _ = bespoke_step(velocity, states[:-1].flatten(0, 1), change, order, index, cond)
    local = rms(states[1:].flatten(0, 1) - arrived).reshape(steps, count)
    return error_weights(change, order, L_tau) @ local


def rollout_rmse(denoiser: Denoiser, sampler: Bespoke, held: Sequence[TruePaths]) -> float:
    """Mean over paths of the root-mean-square distance of a solver's end points to the true ones."""
    errors = [rms(sampler(denoiser, paths.latents, paths.cond) - paths.ends) for paths in held]
    return float(torch.cat(errors).mean())


def rms(difference: Tensor) -> Tensor:
    """Root mean square over each image's numbers, [N]; its gradient at 0 is 0."""
    return (difference.square().flatten(1).mean(1) + torch.finfo(difference.dtype).tiny).sqrt()


def _repeated(cond: Condition, times: int) -> Condition:
    """The condition of a batch that is stacked `times` times."""
    return cond.map(lambda rows: rows.repeat(times, *[1] * (rows.ndim - 1)))
