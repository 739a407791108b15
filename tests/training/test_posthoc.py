"""Post-hoc averages against averages that were really kept, and stored weights combined."""

import numpy as np
import pytest
import torch

from imagewright.cli.main import main
from imagewright.training import posthoc
from imagewright.training.config import EmaConfig
from imagewright.training.ema import Ema, Power, gamma_of_std
from imagewright.training.posthoc import Profile, inner_product, reconstruct, solve
from imagewright.training.weights import Combinations, combine, differences, flatten, store, stored, unflatten
from imagewright.types import UserError


def test_widths_and_exponents_are_the_papers():
    assert gamma_of_std(0.05) == pytest.approx(16.97, abs=0.01) and gamma_of_std(0.1) == pytest.approx(6.94, abs=0.01)
    for std in (0.03, 0.1, 0.25):
        g = gamma_of_std(std)
        assert np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(std)


def test_inner_product_is_the_integral():
    a, b = Profile(800.0, 0.1), Profile(1000.0, 0.2)
    tau = np.linspace(0, 800, 400_001)
    densities = [
        (gamma_of_std(p.std) + 1) / p.images * (tau / p.images) ** gamma_of_std(p.std) for p in (a, b)
    ]  # normalised to 1 over their own time
    want = np.trapezoid(densities[0] * densities[1], tau)
    assert inner_product(a, b) == pytest.approx(want, rel=1e-6) == inner_product(b, a)


def test_a_stored_average_is_itself():
    available = [Profile(n, s) for n in (100, 200, 300) for s in (0.05, 0.1)]
    for i, wanted in enumerate(available):
        np.testing.assert_allclose(solve(available, wanted), np.eye(6)[i], atol=1e-6)


def test_the_roots_are_found_once_for_each_width(monkeypatch):
    """Of 256 stored averages it took 65,792 of them, 362 times as long as the least-squares solve."""
    asked = []
    monkeypatch.setattr(posthoc, "gamma_of_std", lambda std: asked.append(std) or gamma_of_std(std))
    available = [Profile(1000 * n, s) for n in range(1, 129) for s in (0.05, 0.1)]
    found = solve(available, Profile(128_000, 0.07))
    assert found.sum() == pytest.approx(1) and len(asked) <= 6


def test_step_by_step_is_the_profiles_weighted_sum():
    module = torch.nn.Linear(1, 1, bias=False).double()
    average, values = Ema(module, Power(0.1)), []
    for step in range(1, 41):
        torch.nn.init.constant_(module.weight, np.sin(step))
        average.update(module, 10 * step, 10)
        values.append(np.sin(step))
    exponent = gamma_of_std(0.1) + 1
    edges = (np.arange(41) / 40) ** exponent
    assert float(average.state["weight"]) == pytest.approx(float(np.diff(edges) @ values), rel=1e-9)


def test_reconstructs_a_width_that_was_not_kept(tmp_path):
    """A drifting, wiggling weight: 0.07 from snapshots of 0.05 and 0.10, against an average of 0.07 really kept."""
    module = torch.nn.Linear(2, 2)
    kept = [Ema(module, Power(s)) for s in (0.05, 0.1)]
    truth = Ema(module, Power(0.07))
    for step in range(1, 2001):
        with torch.no_grad():
            module.weight.fill_(3 * np.sqrt(step / 2000) + 0.3 * np.sin(step / 40))
            module.weight[0, 1] = np.cos(step / 300)
        for average in (*kept, truth):
            average.update(module, 10 * step, 10)
        if step % 125 == 0:
            for average in kept:
                store(tmp_path, average.profile.name, 10 * step, average.state)
    found = reconstruct(tmp_path, 0.07)
    torch.testing.assert_close(found["weight"], truth.state["weight"], rtol=0.01, atol=0.003)
    worst = max(float((k.state["weight"] - truth.state["weight"]).abs().max()) for k in kept)
    assert float((found["weight"] - truth.state["weight"]).abs().max()) < worst / 20


def test_combinations(tmp_path):
    generator = torch.Generator().manual_seed(0)
    states = [
        {"a": torch.randn(3, 2, generator=generator), "n": torch.tensor(i), "b": torch.randn(4, generator=generator)}
        for i in range(4)
    ]
    paths = [store(tmp_path, "raw", 10 * i, s) for i, s in enumerate(states)]
    assert [s.images for s in stored(tmp_path, "raw")] == [0, 10, 20, 30] and stored(tmp_path, "power0.1") == []
    assert all(torch.equal(combine(paths, [0, 0, 1, 0])[k], states[2][k]) for k in states[2])
    alpha = [2.5, -1.0, 0.25, -0.75]
    found = combine(paths, alpha)
    torch.testing.assert_close(found["a"], sum(c * s["a"] for c, s in zip(alpha, states, strict=True)))
    assert int(found["n"]) == 3
    first, rows = differences(paths)
    torch.testing.assert_close(flatten(found), flatten(first) + torch.tensor(alpha[1:]) @ rows)
    assert torch.equal(unflatten(flatten(found), first)["b"], found["b"])
    held, anew = Combinations(paths), Combinations(paths, most=0)
    assert held.held and not anew.held and not hasattr(anew, "_rows") and held.bytes == anew.bytes == 3 * 10 * 4
    for each in (held, anew):
        torch.testing.assert_close(each(np.array(alpha))["a"], found["a"])
    # The same tensor added to every file is added to the answer.
    moved = [store(tmp_path, "moved", 10 * i, {**s, "a": s["a"] + 7}) for i, s in enumerate(states)]
    torch.testing.assert_close(combine(moved, alpha)["a"], found["a"] + 7)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda d: combine([], []), "0 coefficients for 0 stored weights"),
        (lambda d: differences([]), "there are no stored weights; train with --training.weights-images"),
        (lambda d: combine([store(d, "raw", 1, {"a": torch.ones(1)})], [0.5]), "sum to 0.5; they must sum to 1"),
        (lambda d: reconstruct(d, 0.1), "kept no power-function averages; train with --training.weights-images"),
        (lambda d: reconstruct(d, 0.5), r"--std is 0\.5; it must lie in \(0, 0\.29\)"),
        (lambda d: solve([Profile(100, 0.1)], Profile(50, 0.1)), "no stored average is from before 50 images; .* 100"),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path, act, sentence):
    with pytest.raises(UserError, match=sentence):
        act(tmp_path)


def test_a_run_keeps_what_it_was_asked_to(tmp_path, tiny_recipe):
    assert EmaConfig(power_std=(0.1,)).power_std == (0.1,)
    run = tmp_path / "run"
    options = ["--training.weights-images", "32", "--training.ema.power-std", "0.05", "0.1"]
    main(["train", str(tiny_recipe), "--out", str(run), "--device", "cpu", *options])
    kinds = {s.kind for s in stored(run)}
    assert kinds == {"raw", "power0.05", "power0.1"}
    counts = [s.images for s in stored(run, "raw")]
    assert counts == sorted(counts) and len(counts) >= 2
    assert reconstruct(run, 0.07).keys() == combine([stored(run, "raw")[-1].path], [1.0]).keys()
