"""SIMS: away from what a model becomes on its own samples (Alemohammad et al. 2024, arXiv 2408.16333).

    D = D_base + omega (D_base - D_auxiliary)

Ingredients   the auxiliary starts from the base's weights, sees the base's own samples only, and is trained with the
           base's loss and optimiser; the same sampler makes the samples and the test; labels are kept; omega and the
           fine-tuning budget are searched together. A self-consuming loop, in which every generation learns from real
           data polluted by the one before, runs plainly ("model autophagy") or with SIMS in each generation.
Departs    no official program is known; sizes are from public summaries of the paper. Fine-tuning goes on with the
           recipe's rate as it was before its cooldown, constant, with a fresh optimiser, and an average whose half-life
           is at most a tenth of the budget. Each budget is a run of its own. `tune sims` draws the copy's classes
           evenly. The loop keeps the samples of the last generation alone, `pollution` of them to a real image. Moving
           the share of classes (the paper's fairness use) needs no code: give other labels to `draw`.
What a model, a data set and a sampler are is the caller's: the same loop serves images and points in the plane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from imagewright.tuning.scores import lowest
from imagewright.types import UserError

Model = TypeVar("Model")
Data = TypeVar("Data")
Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Recipe(Generic[Model, Data]):
    """How a loop trains and draws. Every function gets the generation's number, from which it takes its seeds.

    train: from scratch on data. fine_tune: a copy of a model on data. draw: a new set from a base model and, with
    omega, away from an auxiliary (None: the base alone). mix: real data polluted by synthetic data.
    """

    train: Callable[[Data, int], Model]
    fine_tune: Callable[[Model, Data, int], Model]
    draw: Callable[[Model, Model | None, float, int], Data]
    mix: Callable[[Data, Data, int], Data]


@dataclass(frozen=True)
class Generation(Generic[Model, Data]):
    """One turn of the self-consuming loop: the base model, its auxiliary (with SIMS), and the samples it hands on."""

    index: int
    base: Model
    auxiliary: Model | None
    samples: Data


def auxiliary_of(base: Model, recipe: Recipe[Model, Data], generation: int = 0) -> Model:
    """Draw from the base model, and fine-tune a copy of it on nothing else."""
    return recipe.fine_tune(base, recipe.draw(base, None, 0.0, generation), generation)


def self_consuming(
    real: Data, recipe: Recipe[Model, Data], generations: int, omega: float = 0.0
) -> Iterator[Generation[Model, Data]]:
    """Generation 0 learns from real data; each later one from real data mixed with the samples of the one before.

    omega = 0: the plain loop. omega > 0: every generation draws away from its auxiliary. Raises UserError for fewer
    than one generation or a negative omega.
    """
    if generations < 1 or omega < 0:
        raise UserError(f"generations is {generations} and omega {omega}; they must be at least 1 and at least 0")
    data = real
    for index in range(generations):
        base = recipe.train(data, index)
        auxiliary = auxiliary_of(base, recipe, index) if omega > 0 else None
        samples = recipe.draw(base, auxiliary, omega, index)
        yield Generation(index, base, auxiliary, samples)
        data = recipe.mix(real, samples, index)


def best_setting(scores: Sequence[tuple[Setting, float]]) -> Setting:
    """The setting, a budget and an omega say, of the lowest score, as `lowest` has it."""
    return lowest(scores)
