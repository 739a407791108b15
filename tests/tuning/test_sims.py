"""The self-consuming loop on numbers: what is trained on what, and when an auxiliary is asked for."""

import pytest

from imagewright.tuning.sims import Recipe, auxiliary_of, best_setting, self_consuming
from imagewright.types import UserError


def recipe(log):
    """Models and data sets are strings that say how they were made."""

    def noted(text):
        log.append(text)
        return text

    return Recipe(
        train=lambda data, g: noted(f"train({data}, {g})"),
        fine_tune=lambda model, data, g: noted(f"tune({model}, {data}, {g})"),
        draw=lambda base, other, omega, g: f"draw({base}, {other}, {omega:g}, {g})",
        mix=lambda real, made, g: f"mix({real}, {made}, {g})",
    )


def test_auxiliary_starts_from_the_base_and_sees_its_samples_alone():
    assert auxiliary_of("B", recipe([])) == "tune(B, draw(B, None, 0, 0), 0)"


def test_plain_loop_never_tunes():
    log = []
    first, second = self_consuming("real", recipe(log), 2)
    assert (first.base, first.auxiliary) == ("train(real, 0)", None)
    assert second.base == "train(mix(real, draw(train(real, 0), None, 0, 0), 0), 1)"
    assert not any(line.startswith("tune") for line in log)


def test_with_omega_every_generation_draws_away_from_its_auxiliary():
    first, second = self_consuming("real", recipe([]), 2, omega=0.5)
    base = "train(real, 0)"
    auxiliary = f"tune({base}, draw({base}, None, 0, 0), 0)"
    assert (first.auxiliary, first.samples) == (auxiliary, f"draw({base}, {auxiliary}, 0.5, 0)")
    assert second.base == f"train(mix(real, {first.samples}, 0), 1)"


def test_best_setting_is_the_first_of_equals():
    scores = [((0, 0.0), 2.0), ((1, 0.5), 1.0), ((1, 1.0), 1.0), ((2, 2.0), 3.0)]
    assert best_setting(scores) == (1, 0.5)


def test_a_score_that_is_no_number_is_never_the_best():
    nan = float("nan")
    assert best_setting([("a", nan), ("b", 2.0), ("c", nan), ("d", 1.0)]) == "d"
    with pytest.raises(UserError, match="none of the candidates has a finite score"):
        best_setting([("a", nan), ("b", float("inf"))])


def test_settings_are_checked():
    with pytest.raises(UserError, match="generations is 0 and omega 0"):
        next(self_consuming("real", recipe([]), 0))
    with pytest.raises(UserError, match=r"omega -1"):
        next(self_consuming("real", recipe([]), 2, omega=-1))
