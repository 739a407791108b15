"""LCSC: search a linear combination of saved checkpoints (Liu et al. 2024, arXiv 2404.02241), section 4, algorithm 1.

    theta(alpha) = sum_i alpha_i theta_i,   sum_i alpha_i = 1, any sign

Ingredients   raw (not averaged) weights of one run in a window of training that ends where one likes, some steps apart
           (`training.weights_images`, `choose_weights`), written as the first plus multiples of differences; a
           population that starts from exponential averages of many rates within the window, the last weights and the
           plain mean, so that the result is never worse than the best of them on the search's measure; parents from
           the best of the population, coefficient-wise crossover, Gaussian mutation of a random subset, the sum
           restored to 1; one fixed set of noise and labels for all candidates. The measure is the
           caller's: a feature distance with the
           very sampler of use, of a denoiser or of a consistency model.
Official   github.com/imagination-research/LCSC has training, sampling and the measure, and not the search ("will soon
           release it"). What is left of it in scripts/image_sample_dm.py, unused: data_num 5000, read here as the
           images of a candidate; weights from 10,050 to 50,000 of a folder called 50_interval_save, 800 if that is
           their spacing (interval is 1000 beside it). FID is pytorch-fid's for consistency models; one-step sampling
           of them from sigma 80, clipped; two-step sampling is advised against after a search at one.
Departs    the operators' rates and sizes, the shares of the crossover beyond [0, 1], the mixture of three mutation
           sizes, and that a worse member makes way after every child rather than after a generation of them, are ours.
           The sum is restored by adding evenly where a division could blow the coefficients up. A candidate's classes
           are drawn once, as its noise is. Averages of the first population start at the window's first weights. The
           paper's budget is some 2000 candidates; defaults are for one processor. Offered beside it: random affine
           combinations as a control with the same number of evaluations and no search, and non-negative coefficients.
Memory     all differences as one float32 matrix, K - 1 times the model, up to 8 GiB; beyond that the files are read
           for each candidate, one at a time (`training.weights.Combinations`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from imagewright.tuning.scores import cost
from imagewright.types import UserError

Vector = npt.NDArray[np.float64]
Fitness = Callable[[Vector], float]


@dataclass(frozen=True, kw_only=True)
class LCSC:
    """Settings of the search."""

    evaluations: int = 300
    """How often a candidate is measured, the first population included."""
    ema_rates: int = 18
    """Exponential averages in the first population, from nearly the last weights to nearly the plain mean."""
    parents: int = 8
    """Both parents of a child come from so many best of everything measured; there is no other population."""
    mutation_share: float = 0.3
    """Probability of each coefficient to be changed."""
    mutation_size: float = 0.5
    """Largest standard deviation of the change, in units of the first parent's root-mean-square coefficient."""
    nonnegative: bool = False
    """Keep every coefficient >= 0 (a control: the published method does not)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ema_rates + 2 > self.evaluations:  # beside them the last weights and the plain mean
            raise UserError(
                f"ema_rates is {self.ema_rates} and evaluations is {self.evaluations}; the first population has two "
                "members more than rates, and all are measured"
            )
        if not 2 <= self.parents <= self.ema_rates + 2:
            raise UserError(
                f"parents is {self.parents} and ema_rates is {self.ema_rates}; parents must lie in [2, ema_rates + 2], "
                "the first population"
            )
        if not (0 < self.mutation_share <= 1 and self.mutation_size > 0 and self.ema_rates >= 1):
            raise UserError(
                f"mutation_share is {self.mutation_share}, mutation_size {self.mutation_size} and ema_rates "
                f"{self.ema_rates}; they must satisfy 0 < share <= 1, size > 0, rates >= 1"
            )


@dataclass(frozen=True)
class Found:
    """What a search found: coefficients, oldest weights first, and its path there."""

    coefficients: Vector
    fitness: float
    best_so_far: list[float] = field(default_factory=list)
    """After each evaluation; never increases, and starts with the averages."""
    best_average: float = float("inf")
    """Fitness of the best exponential average of the first population."""
    best_average_coefficients: Vector | None = None


def choose_weights(
    images: Sequence[int], until: int | None = None, length: int | None = None, spacing: int | None = None
) -> list[int]:
    """Which of a run's kept weights to combine: their indices, oldest first.

    images: after how many images of training each was kept, ascending. until: the newest are the last ones up to there.
    length: images between the oldest and the newest. spacing: least number of images between two. None: no limit.
    Raises UserError when fewer than two are left, or a limit excludes nothing because no weights lie beyond it.
    """
    chosen = [i for i, at in enumerate(images) if until is None or at <= until]
    if not chosen:
        raise UserError(f"--until is {until}; the first weights were kept after {images[0] if images else 0} images")
    span = images[chosen[-1]] - images[chosen[0]]
    gap = min((b - a for a, b in pairwise(images)), default=0)
    if length is not None and not 0 < length <= span:
        raise UserError(f"--window is {length}; it must lie in (0, {span}], what the kept weights span")
    if spacing is not None and spacing < gap:
        raise UserError(f"--spacing is {spacing}; the weights were kept every {gap} images, it must be at least that")
    oldest = images[chosen[-1]] - (span if length is None else length)
    kept = [chosen[-1]]
    for i in reversed(chosen[:-1]):
        if images[i] >= oldest and images[kept[-1]] - images[i] >= (spacing or 0):
            kept.append(i)
    if len(kept) < 2:
        raise UserError("--until, --window and --spacing leave one of the kept weights; a combination needs at least 2")
    return kept[::-1]


def ema_coefficients(count: int, decay: float) -> Vector:
    """Weights of an exponential average over `count` checkpoints that started at the first one.

    (1 - b) b^(K - i), and what is missing to 1 on the first. decay: b in [0, 1); 0 is the last checkpoint alone.
    """
    coefficients = (1 - decay) * decay ** np.arange(count - 1, -1, -1, dtype=np.float64)
    coefficients[0] += decay**count
    return coefficients


def first_population(count: int, rates: int) -> list[Vector]:
    """Exponential averages whose memory grows geometrically from under one checkpoint to all, and the plain mean."""
    memories = np.geomspace(0.5, 4 * count, rates)
    return [*(ema_coefficients(count, float(np.exp(-1 / m))) for m in memories), np.full(count, 1 / count)]


def search(
    count: int, fitness: Fitness, config: LCSC, on_progress: Callable[[int, float], None] = lambda done, best: None
) -> Found:
    """Minimise `fitness` over coefficients of `count` checkpoints (>= 2).

    fitness must be deterministic: the same noise, labels and number of images for every candidate. on_progress: called
    with the evaluations so far and the best fitness. Raises UserError for fewer than two checkpoints.
    """
    if count < 2:
        raise UserError(f"there are {count} stored weights; a combination needs at least 2")
    generator = np.random.default_rng(config.seed)
    history: list[float] = []

    def measured(candidate: Vector) -> tuple[float, Vector]:
        value = cost(fitness(candidate))
        history.append(min(value, history[-1]) if history else value)
        on_progress(len(history), history[-1])
        return value, candidate

    start = [measured(c) for c in [*_one_hot_last(count), *first_population(count, config.ema_rates)]]
    best_average = min(start, key=_value)
    members = sorted(start, key=_value)[: config.parents]
    while len(history) < config.evaluations:
        child = measured(_child(members, generator, config))
        members.append(child)
        members.sort(key=_value)
        del members[config.parents :]
    return Found(members[0][1], members[0][0], history, *best_average)


def random_control(about: Vector, fitness: Fitness, evaluations: int, seed: int, scale: float = 0.5) -> Found:
    """As many evaluations without a search: random affine combinations about one, which is measured first.

    scale: length of what is added to the coefficients, about.
    """
    generator = np.random.default_rng(seed)
    history: list[float] = []
    best: tuple[float, Vector] = (float("inf"), about)
    for k in range(evaluations):
        offset = _sum_zero(generator.normal(size=len(about))) * scale / np.sqrt(len(about))
        candidate = about + (offset if k else 0)
        best = min(best, (cost(fitness(candidate)), candidate), key=_value)
        history.append(best[0])
    return Found(best[1], best[0], history)


def _child(members: Sequence[tuple[float, Vector]], generator: np.random.Generator, config: LCSC) -> Vector:
    """Coefficient-wise crossover of two of the best, mutation of a random subset, renormalised to sum 1."""
    first, second = generator.choice(len(members), size=2, replace=False)
    a, b = members[first][1], members[second][1]
    # An interpolation with its own share for each coefficient; shares beyond [0, 1] let the search leave the hull.
    child = a + generator.uniform(-0.25, 1.25, size=len(a)) * (b - a)
    changed = generator.random(len(a)) < config.mutation_share
    size = config.mutation_size * float(np.sqrt(np.mean(a**2)))
    child = child + changed * generator.normal(scale=size, size=len(a)) * generator.choice([1.0, 0.3, 0.1])
    if config.nonnegative:
        child = child.clip(min=0)
        return np.asarray(child / child.sum()) if child.sum() > 0 else a
    # The sum is restored by adding evenly, not by dividing: a sum near 0 would blow the coefficients up.
    return np.asarray(child + (1 - child.sum()) / len(child))


def _one_hot_last(count: int) -> list[Vector]:
    last = np.zeros(count)
    last[-1] = 1.0
    return [last]


def _sum_zero(values: Vector) -> Vector:
    return np.asarray(values - values.mean())


def _value(member: tuple[float, Vector]) -> float:
    return member[0]
