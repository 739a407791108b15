"""AutoDiffusion: search time steps and skipped layers of a trained model (Li et al. 2023, arXiv 2309.10438).

A candidate is K distinct time steps of a discrete schedule and, for each, the layers that the network leaves out there
(`guidance.layer_skipping`). DDIM draws with it; an evolution minimises a measure of what is drawn; nothing is trained.

Ingredients   population 50, best 10 of everything seen as parents; 25 mutants (each time replaced with probability
           0.25 by one that the parent lacks; a step of the full network gets a list of skipped layers with the same
           probability), 15 crossovers (entry by entry from two parents, the longer one's tail kept), the rest random;
           every candidate measured once, at most 10 attempts for each one wanted; the first population holds the
           uniform sequence, random candidates, and the uniform one mutated with probability 0.1. Refinement: windows of
           T/100 about known times. With a layer budget: random candidates add steps while the layers computed in all
           fit, so skipping may buy steps; first times alone with the full network, then the share of skipped layers
           grows by max_prun / 5 a generation. The measure of images is `tuning.feature_distance`.
Departs    from lilijiangg/AutoDiffusion, examples/guided_diffusion/search_*.py. Entries are kept in order of time, and
           a list of skipped layers stays with its time (theirs are in the order drawn, and list i is used at the i-th
           smallest time). A time that a child has already is replaced by a new one (theirs loses the step); the tail of
           the longer parent is always kept (theirs compares lists where lengths are meant); a child that costs more
           than the budget loses random steps (theirs is measured as it is). Skipped layers do mutate (there, an
           assignment written as a comparison keeps them). The share of skipped layers never passes max_prun; random
           candidates are sought `retries` times (theirs: for ever). What is measured is not guided by a classifier and
           its estimates are not clipped. The search over times alone measures one more population there, which its
           result leaves out. A control is offered: as many candidates, all random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from imagewright.paths.discrete import DiscreteSchedule, uniform_times
from imagewright.tuning.scores import cost
from imagewright.types import Denoiser, UserError

OnProgress = Callable[[int, float], None]
"""Called with the evaluations so far and the best fitness."""


@dataclass(frozen=True, order=True)
class Candidate:
    """What is searched. times: strictly increasing; skips: for each of them, the increasing ids of skipped layers."""

    times: tuple[int, ...]
    skips: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, steps: Mapping[int, Iterable[int]] | Iterable[int]) -> Candidate:
        """From time steps in any order: alone, or as a table of skipped layers."""
        table = steps if isinstance(steps, Mapping) else dict.fromkeys(steps, ())
        times = tuple(sorted(table))
        return cls(times, tuple(tuple(sorted(set(table[t]))) for t in times))

    def to_json(self) -> dict[str, Any]:
        """{"timesteps": [...], "skip_layers": [[...], ...]}, the published code's names."""
        return {"timesteps": list(self.times), "skip_layers": [list(ids) for ids in self.skips]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Candidate:
        """Inverse of `to_json`; skip_layers may be missing. Raises UserError unless times differ, with a list each."""
        times = [int(t) for t in value["timesteps"]]
        skips = value.get("skip_layers") or [()] * len(times)
        if len(set(times)) < len(times) or len(skips) != len(times) or not times:
            raise UserError(
                f"timesteps are {times} with {len(skips)} lists of skip_layers; "
                "they must be distinct, with one list each"
            )
        return cls.of({t: [int(i) for i in ids] for t, ids in zip(times, skips, strict=True)})

    def levels(self, schedule: DiscreteSchedule, denoiser: Denoiser) -> dict[float, tuple[int, ...]]:
        """Noise level -> skipped layers, noisiest first, cut to the denoiser's range.

        Times beyond the range share its end: DDIM's step between equal levels changes nothing, so one stands for all.
        """
        sigmas = schedule.sigmas(self.times, denoiser.sigma_min, denoiser.sigma_max).tolist()
        return dict(sorted(zip(sigmas, self.skips, strict=True), reverse=True))


Fitness = Callable[[Candidate], float]
"""Lower is better. It is asked once for each candidate."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be chosen. A candidate has `steps` time steps; with `layers`, as many as `max_layers` buys."""

    schedule: DiscreteSchedule = field(default_factory=DiscreteSchedule)
    steps: int = 4
    """K; a search with layers ignores it."""
    times: tuple[int, ...] = ()
    """Time steps to choose from, such as `schedule.known(...)`; empty: all. The uniform sequence enters in any case."""
    layers: int = 0
    """Layers of the network that may be skipped (`guidance.layer_skipping.layers_of`); 0: none is."""
    max_layers: int = 0
    """N_max: layers computed in all steps together, at most."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(sorted(set(self.times))) or tuple(range(self.schedule.T)))
        self.schedule.sigmas(self.times)  # refuses times that the schedule lacks
        if self.layers < 0 or (self.layers and self.max_layers < self.layers):
            raise UserError(
                f"layers is {self.layers} and max_layers {self.max_layers}; the budget must pay for one step at least"
            )
        if not 1 <= self.full_steps <= len(self.times):
            raise UserError(
                f"steps is {self.full_steps}; it must lie in 1 to {len(self.times)}, the times to choose from"
            )

    @property
    def full_steps(self) -> int:
        """Steps of the full network that the budget pays for."""
        return self.max_layers // self.layers if self.layers else self.steps

    def cost(self, skips: Iterable[Sequence[int]]) -> int:
        """Layers computed; without `layers`, the number of steps."""
        return sum((self.layers or 1) - len(ids) for ids in skips)

    def affords(self, cost: int) -> bool:
        """Whether the budget pays for it."""
        return cost <= (self.max_layers if self.layers else self.steps)

    def uniform(self) -> Candidate:
        """The "ddimK" sequence with the full network. Raises UserError when no stride gives so many steps."""
        return Candidate.of(uniform_times(self.full_steps, self.schedule.T))

    def around(self, core: Iterable[int]) -> Space:
        """The refinement stage: times t - T/100 <= t' < t + T/100 about known times and about the uniform ones."""
        reach, total = self.schedule.T // 100, self.schedule.T
        centres = [*core, *self.uniform().times]
        return replace(self, times=tuple({t for c in centres for t in range(max(c - reach, 0), min(c + reach, total))}))


@dataclass(frozen=True, kw_only=True)
class AutoDiffusion:
    """Settings of the search; `joint` has those that the paper uses with a layer budget."""

    generations: int = 10
    """How often a population is measured, the first included."""
    population: int = 50
    parents: int = 10
    mutants: int = 25
    crossovers: int = 15
    mutation: float = 0.25
    """Probability of each entry to be replaced."""
    first_random: int = 25
    """Random candidates in the first population."""
    first_mutation: float = 0.1
    retries: int = 10
    """Attempts for each candidate that is wanted from an operator."""
    max_prun: float = 0.1
    """Largest share of layers that a new list skips."""
    min_prun: float = 0.0
    """Smallest, after generation `full_generations`."""
    full_generations: int = 6
    """Generations with the full network, the first included, unless the best stops changing before."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.generations >= 1 and self.retries >= 1 and 2 <= self.parents <= self.population):
            raise UserError(
                f"generations is {self.generations}, retries {self.retries}, parents {self.parents} and population "
                f"{self.population}; they must satisfy generations, retries >= 1 and 2 <= parents <= population"
            )
        if not (min(self.mutants, self.crossovers) >= 0 and self.mutants + self.crossovers <= self.population):
            raise UserError(
                f"mutants is {self.mutants} and crossovers {self.crossovers}; "
                f"together they must fit a population of {self.population}"
            )
        if not 0 <= self.first_random < self.population:
            raise UserError(f"first_random is {self.first_random}; it must lie in 0 to {self.population - 1}")
        if not (0 < self.mutation <= 1 and 0 < self.first_mutation <= 1):
            raise UserError(
                f"mutation is {self.mutation} and first_mutation {self.first_mutation}; both must lie in (0, 1]"
            )
        if not 0 <= self.min_prun <= self.max_prun < 1:
            raise UserError(
                f"min_prun is {self.min_prun} and max_prun {self.max_prun}; they must satisfy 0 <= min <= max < 1"
            )

    @classmethod
    def joint(cls, **settings: Any) -> AutoDiffusion:
        """15 generations and 10 crossovers, unless told otherwise."""
        return cls(**{"generations": 15, "crossovers": 10} | settings)

    def sized(self, population: int) -> AutoDiffusion:
        """The same search with another population, of which mutants, children, parents and the rest keep their shares.

        There are at least two parents. Raises UserError for a population below 2.
        """
        kept = {
            name: getattr(self, name) * population // self.population
            for name in ("parents", "mutants", "crossovers", "first_random")
        }
        return replace(self, population=population, **kept | {"parents": max(2, kept["parents"])})


@dataclass(frozen=True)
class Found:
    """What a search found, and its path there."""

    best: Candidate
    fitness: float
    uniform: float | None
    """Fitness of the uniform sequence; None where it was not asked for."""
    best_so_far: list[float]
    """After each evaluation; never increases."""
    by_generation: list[float]
    """The same after each generation."""
    parents: list[tuple[Candidate, float]]
    """The best of everything seen."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        parents = [{"fitness": value, **candidate.to_json()} for candidate, value in self.parents]
        return asdict(self) | {"best": self.best.to_json(), "parents": parents, "evaluations": len(self.best_so_far)}


def search(
    space: Space, fitness: Fitness, config: AutoDiffusion, on_progress: OnProgress = lambda done, best: None
) -> Found:
    """Minimise `fitness` by evolution. It is never worse, on this measure, than the uniform sequence.

    It ends early when the space holds no candidate that is new.
    """
    operators = Operators(space, np.random.default_rng(config.seed))
    seen = _Seen(fitness, on_progress)
    seen.measure(_first_population(space, operators, config))
    by_generation, bests = [seen.best_so_far[-1]], [seen.best(1)]
    second_stage: int | None = None
    for generation in range(1, config.generations):
        unchanged = len(bests) > 1 and bests[-1] == bests[-2]
        if second_stage is None and (generation >= config.full_generations or unchanged):
            second_stage = generation
        operators.skipped = _skip_range(config, generation, second_stage)
        population = _next_population(seen, operators, config)
        if not population:
            break
        seen.measure(population)
        by_generation.append(seen.best_so_far[-1])
        bests.append(seen.best(1))
    return seen.found(config.parents, by_generation, seen.scores[space.uniform()])


def random_search(
    space: Space, fitness: Fitness, config: AutoDiffusion, on_progress: OnProgress = lambda done, best: None
) -> Found:
    """The control: as many candidates in the same stages, the uniform sequence among them, but all others random."""
    nothing_learnt = replace(config, mutants=0, crossovers=0, first_random=config.population - 1)
    return search(space, fitness, nothing_learnt, on_progress)


class Operators:
    """Random candidates, mutants and children; all of them within the space and its budget.

    skipped: least and largest share of layers that a new list leaves out.
    """

    def __init__(self, space: Space, generator: np.random.Generator) -> None:
        self.space, self.generator = space, generator
        self.skipped = (0.0, 0.0)

    def random(self) -> Candidate:
        """Steps drawn while the budget pays for another one that skips as much as it may."""
        steps: dict[int, tuple[int, ...]] = {}
        while (time := self._time(set(steps))) is not None:
            ids = self._skips(self.space.cost(steps.values()))
            if ids is None:
                break
            steps[time] = ids
        return Candidate.of(steps)

    def mutated(self, parent: Candidate, probability: float) -> Candidate:
        """Each time, and each skipped layer, replaced with this probability; where none is skipped, the whole list."""
        steps: dict[int, tuple[int, ...]] = {}
        for time, ids in zip(parent.times, parent.skips, strict=True):
            replaced = self.generator.random() < probability
            new = self._time({*parent.times, *steps}) if replaced else None
            steps[time if new is None else new] = self._mutated_skips(ids, probability)
        return Candidate.of(steps)

    def crossed(self, first: Candidate, second: Candidate) -> Candidate:
        """Entry by entry from either parent, then the longer one's tail, without random steps while it is too dear.

        A time that the child has already is replaced by a new one.
        """
        steps: dict[int, tuple[int, ...]] = {}
        for i in range(max(len(first.times), len(second.times))):
            one, other = (first, second) if self.generator.random() < 0.5 else (second, first)
            source = one if i < len(one.times) else other
            time = self._time(set(steps)) if source.times[i] in steps else source.times[i]
            if time is not None:
                steps[time] = source.skips[i]
        while not self.space.affords(self.space.cost(steps.values())):
            del steps[list(steps)[int(self.generator.integers(len(steps)))]]
        return Candidate.of(steps)

    def _time(self, taken: set[int]) -> int | None:
        """A random time of the space that is not taken; None if there is none."""
        free = [t for t in self.space.times if t not in taken]
        return free[int(self.generator.integers(len(free)))] if free else None

    def _skips(self, spent: int) -> tuple[int, ...] | None:
        """Layers to leave out of one more step when so many are spent; None where not even the most is enough.

        Their number is the drawn share's whole part, drawn again while it is too small, as published.
        """
        space, (least, most) = self.space, self.skipped
        needed = spent + (space.layers or 1) - (space.max_layers if space.layers else space.steps)
        if needed > self._count(most):
            return None
        shares = least + (most - least) * self.generator.random(100)
        count = next((n for share in shares if (n := self._count(float(share))) >= needed), self._count(most))
        return self._drawn(count)

    def _count(self, share: float) -> int:
        return int(share * self.space.layers + 1e-9)

    def _drawn(self, count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in self.generator.permutation(self.space.layers)[:count])

    def _mutated_skips(self, ids: tuple[int, ...], probability: float) -> tuple[int, ...]:
        if not ids:
            least, most = self.skipped
            if most == 0 or self.generator.random() >= probability:
                return ids
            return self._drawn(self._count(least + (most - least) * float(self.generator.random())))
        kept = set(ids)
        for old in ids:
            free = [i for i in range(self.space.layers) if i not in kept and i not in ids]
            if free and self.generator.random() < probability:
                kept.remove(old)
                kept.add(free[int(self.generator.integers(len(free)))])
        return tuple(kept)


class _Seen:
    """Every candidate that was measured, with its fitness."""

    def __init__(self, fitness: Fitness, on_progress: OnProgress) -> None:
        self.fitness, self.on_progress = fitness, on_progress
        self.scores: dict[Candidate, float] = {}
        self.best_so_far: list[float] = []

    def measure(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            value = cost(self.fitness(candidate))
            self.scores[candidate] = value
            self.best_so_far.append(min([value, *self.best_so_far[-1:]]))
            self.on_progress(len(self.best_so_far), self.best_so_far[-1])

    def best(self, count: int) -> list[tuple[Candidate, float]]:
        return sorted(self.scores.items(), key=lambda item: item[1])[:count]

    def found(self, count: int, by_generation: list[float], uniform: float | None) -> Found:
        best = self.best(count)
        return Found(best[0][0], best[0][1], uniform, self.best_so_far, by_generation, best)


def _first_population(space: Space, operators: Operators, config: AutoDiffusion) -> list[Candidate]:
    uniform = space.uniform()
    population = [uniform]
    population += _new(operators.random, config.first_random, population, config.retries)
    wanted = config.population - len(population)
    return population + _new(
        lambda: operators.mutated(uniform, config.first_mutation), wanted, population, config.retries
    )


def _next_population(seen: _Seen, operators: Operators, config: AutoDiffusion) -> list[Candidate]:
    """Mutants, children, and random candidates up to the population's size; all new."""
    parents = [candidate for candidate, _ in seen.best(config.parents)]
    choose = operators.generator

    def mutant() -> Candidate:
        return operators.mutated(parents[int(choose.integers(len(parents)))], config.mutation)

    def child() -> Candidate:
        first, second = (int(i) for i in choose.integers(len(parents), size=2))
        return operators.crossed(parents[first], parents[second])

    population: list[Candidate] = []
    for make, wanted in ((mutant, config.mutants), (child, config.crossovers)):
        population += _new(make, wanted, [*seen.scores, *population], config.retries)
    rest = config.population - len(population)
    return population + _new(operators.random, rest, [*seen.scores, *population], config.retries)


def _new(make: Callable[[], Candidate], wanted: int, known: Iterable[Candidate], retries: int) -> list[Candidate]:
    """So many candidates that are not known, or as many as `retries` attempts for each one find."""
    taken = set(known)
    found: list[Candidate] = []
    for _ in range(retries * wanted):
        if len(found) == wanted:
            break
        candidate = make()
        if candidate not in taken:
            taken.add(candidate)
            found.append(candidate)
    return found


def _skip_range(config: AutoDiffusion, generation: int, second_stage: int | None) -> tuple[float, float]:
    """Least and largest share of layers that a new list skips; second_stage: the first generation that skips any."""
    if second_stage is None:
        return 0.0, 0.0
    most = min(config.max_prun, (generation - second_stage + 1) * config.max_prun / 5)
    return min(config.min_prun if generation > config.full_generations else 0.0, most), most
