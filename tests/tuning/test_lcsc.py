"""LCSC's exact checks: averages as coefficients, a quadratic that has to be solved, and what the history promises."""

import numpy as np
import pytest

from imagewright.tuning import lcsc
from imagewright.tuning.lcsc import (
    LCSC,
    _child,
    choose_weights,
    ema_coefficients,
    first_population,
    random_control,
    search,
)
from imagewright.types import UserError


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95])
def test_ema_coefficients_are_a_running_average(decay):
    weights = np.random.default_rng(0).normal(size=(7, 3))
    running = weights[0]
    for row in weights[1:]:
        running = decay * running + (1 - decay) * row
    # Started at the first weights, which then keep what the others leave.
    coefficients = ema_coefficients(7, decay)
    assert coefficients.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(coefficients @ weights, _running(weights, decay), atol=1e-12)
    np.testing.assert_allclose(coefficients @ weights, running, atol=1e-12)


def _running(weights, decay):
    """By hand, from the closed form: (1 - b) b^(K - i), and b^(K - 1) for the first."""
    count = len(weights)
    share = [(1 - decay) * decay ** (count - 1 - i) for i in range(count)]
    share[0] = decay ** (count - 1)
    return np.array(share) @ weights


KEPT = [20, 40, 60, 80, 100, 120]


@pytest.mark.parametrize(
    ("limits", "chosen"),
    [
        ({}, [20, 40, 60, 80, 100, 120]),
        ({"until": 95}, [20, 40, 60, 80]),
        ({"length": 50}, [80, 100, 120]),
        ({"spacing": 40}, [40, 80, 120]),
        ({"until": 100, "length": 60, "spacing": 25}, [60, 100]),
    ],
)
def test_a_window_ends_with_the_newest_weights_and_counts_back_from_there(limits, chosen):
    assert [KEPT[i] for i in choose_weights(KEPT, **limits)] == chosen


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"until": 10}, "--until is 10; the first weights were kept after 20 images"),
        ({"length": 200}, r"--window is 200; it must lie in \(0, 100\], what the kept weights span"),
        ({"spacing": 10}, "--spacing is 10; the weights were kept every 20 images"),
        ({"spacing": 110}, "leave one of the kept weights; a combination needs at least 2"),
    ],
)
def test_a_window_without_effect_or_without_weights_is_refused(limits, sentence):
    with pytest.raises(UserError, match=sentence):
        choose_weights(KEPT, **limits)


def quadratic(seed, count=12, dimension=30):
    generator = np.random.default_rng(seed)
    weights = np.cumsum(generator.normal(size=(count, dimension)), 0)
    alpha = generator.normal(size=count)
    target = (alpha + (1 - alpha.sum()) / count) @ weights
    return lambda c: float(((c @ weights - target) ** 2).sum())


def test_a_quadratic_in_the_span_is_solved():
    found = search(12, quadratic(1), LCSC(evaluations=3000, seed=4))
    assert found.fitness < 0.01 * found.best_average
    assert found.coefficients.sum() == pytest.approx(1.0)
    assert (found.coefficients < 0).any()


def test_history_starts_at_the_averages_and_never_rises():
    fitness = quadratic(2)
    found = search(12, fitness, LCSC(evaluations=100))
    assert len(found.best_so_far) == 100
    assert all(b <= a for a, b in zip(found.best_so_far, found.best_so_far[1:], strict=False))
    assert found.best_average == min(fitness(c) for c in [*np.eye(12)[-1:], *first_population(12, 18)])
    assert found.best_so_far[-1] == found.fitness <= found.best_average
    assert fitness(found.best_average_coefficients) == found.best_average


def test_nonnegative_stays_so_and_is_no_better():
    fitness = quadratic(3)
    free = search(12, fitness, LCSC(evaluations=1500))
    bound = search(12, fitness, LCSC(evaluations=1500, nonnegative=True))
    assert (bound.coefficients >= 0).all() and bound.coefficients.sum() == pytest.approx(1.0)
    assert bound.fitness > free.fitness


def test_search_beats_chance_and_repeats_itself():
    fitness = quadratic(5)
    found = search(12, fitness, LCSC(evaluations=400, seed=1))
    assert found.fitness < random_control(found.best_average_coefficients, fitness, 400, seed=1).fitness
    about = found.best_average_coefficients
    assert random_control(about, fitness, 1, seed=1).best_so_far == [fitness(about)]
    again = search(12, fitness, LCSC(evaluations=400, seed=1))
    assert np.array_equal(again.coefficients, found.coefficients)


def test_a_value_that_is_no_number_never_wins_nor_upsets_the_order():
    calls = []

    def fitness(c):
        calls.append(c)
        return float("nan") if len(calls) % 3 == 0 else quadratic(6)(c)

    found = search(12, fitness, LCSC(evaluations=200))
    assert found.fitness == quadratic(6)(found.coefficients) == found.best_so_far[-1]
    assert all(b <= a for a, b in zip(found.best_so_far, found.best_so_far[1:], strict=False))
    assert found.fitness < found.best_average < float("inf")


def children(config, count=3000, parents=((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))):
    """Of parents given best first, and what of each is left once the evenly restored sum is taken off again."""
    generator = np.random.default_rng(0)
    members = [(float(i), np.array(p)) for i, p in enumerate(parents)]
    made = np.array([_child(members, generator, config) for _ in range(count)])
    np.testing.assert_allclose(made.sum(1), 1.0)
    return made


def test_a_child_has_a_share_of_its_own_at_every_coefficient():
    made = children(LCSC(mutation_size=1e-9))
    # Both parents have 0 in the middle, where the child has but what restores the sum.
    np.testing.assert_allclose(made[:, 1], made[:, 2], atol=1e-7)
    ends = made[:, [0, 3]] - made[:, [1]]
    assert -0.26 < ends.min() < -0.2 and 1.2 < ends.max() < 1.26  # shares go beyond [0, 1] by a quarter
    assert abs(np.corrcoef(ends.T)[0, 1]) < 0.06  # one share for all would tie the ends: their sum would be 1


def test_mutation_changes_a_share_of_the_coefficients_by_three_sizes():
    parent = np.full(40, 1 / 40)
    made = children(LCSC(mutation_share=0.3, mutation_size=0.5), 2000, (parent, parent))
    moved = made - np.median(made, 1, keepdims=True)  # most are unchanged: the median is what restores the sum
    changed = np.abs(moved) > 1e-12
    assert changed.mean() == pytest.approx(0.3, abs=0.02)
    size = np.sqrt((moved**2).sum(1) / changed.sum(1)) / (0.5 / 40)  # of each child, in the published unit
    assert np.histogram(size, [0, 0.2, 0.6, 9])[0] / len(size) == pytest.approx([1 / 3] * 3, abs=0.05)


def test_parents_are_the_best_of_everything_measured(monkeypatch):
    measured, bred = [], []

    def fitness(c):
        measured.append(quadratic(7)(c))
        return measured[-1]

    def child(members, generator, config):
        bred.append(([value for value, _ in members], sorted(measured)[: config.parents]))
        return _child(members, generator, config)

    monkeypatch.setattr(lcsc, "_child", child)
    search(12, fitness, LCSC(evaluations=60, parents=3))
    assert len(bred) == 40 and all(got == best for got, best in bred)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: search(1, quadratic(0), LCSC()), "there are 1 stored weights; a combination needs at least 2"),
        (lambda: LCSC(parents=21), r"parents is 21 and ema_rates is 18; parents must lie in \[2, ema_rates \+ 2\]"),
        (lambda: LCSC(mutation_share=0.0), r"mutation_share is 0\.0"),
        (lambda: LCSC(ema_rates=18, evaluations=19), "ema_rates is 18 .* evaluations is 19"),
    ],
)
def test_bad_settings_are_refused(act, sentence):
    with pytest.raises(UserError, match=sentence):
        act()
