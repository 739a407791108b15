"""Published CTM and sCM runs, digit by digit: the commands of ctm-cifar10 and sony/ctm, FastGen's configurations."""

from __future__ import annotations

import math

import pytest

from imagewright.recipes import RECIPES


def decay(name: str) -> float:
    """What an average keeps at an update."""
    training = RECIPES[name]().training
    return float(0.5 ** (training.batch / training.ema.halflife_images))


@pytest.mark.parametrize(
    ("name", "batch", "micro", "rounds", "lr", "points", "most", "dropout"),
    [
        ("ctm-cifar10", 256, 16, 4, 4e-4, 18, 17, 0.13),
        ("ctm-cifar10-gan", 528, 11, 12, 4e-4, 18, 17, 0.13),
        ("ctm-imagenet64", 1440, 18, 10, 4e-4, 40, 39, 0.0),
        ("ctm-imagenet64-gan", 4224, 11, 48, 8e-6, 40, 20, 0.0),
    ],
)
def test_ctm(name: str, batch: int, micro: int, rounds: int, lr: float, points: int, most: int, dropout: float) -> None:
    """rounds: micro-batches of a process of the published command, whose gradients it adds up."""
    run = RECIPES[name]()
    training, method, optimizer = run.training, run.method, run.training.optimizer
    assert (training.batch, training.micro_batch, training.precision) == (batch, micro, "fp16")
    assert (optimizer.kind, optimizer.lr, optimizer.lr_ramp_images, optimizer.weight_decay) == ("radam", lr, 0, 0.0)
    assert optimizer.clip_norm is None and optimizer.lr_decay_images is None and optimizer.lr_cooldown_images == 0
    assert optimizer.eps == pytest.approx(1e-8 / rounds)
    assert (method.grid_points, method.max_steps or points - 1, method.dropout) == (points, most, dropout)
    assert method.target_decay == 0.999 and decay(name) == pytest.approx(0.999, rel=1e-9)
    assert run.data.xflip and run.data.labels
    if name.endswith("gan"):
        assert method.adversarial.start == 0 and optimizer.lr * method.adversarial.lr_scale == pytest.approx(2e-3)
        assert training.total_images == 30_000 * batch


@pytest.mark.parametrize(
    ("name", "batch", "steps", "kind", "lr", "eps", "p_std"),
    [
        ("scd-cifar10", 512, 500_000, "radam", 1e-4, 1e-8, 1.4),
        ("sct-cifar10", 512, 350_000, "radam", 1e-4, 1e-8, 1.4),
        ("scd-imagenet64", 1024, 600_000, "adam", 7e-5, 1e-11, 1.6),
    ],
)
def test_scm(name: str, batch: int, steps: int, kind: str, lr: float, eps: float, p_std: float) -> None:
    run = RECIPES[name]()
    training, optimizer = run.training, run.training.optimizer
    values = 3 * (32 if name.endswith("cifar10") else 64) ** 2
    assert (training.batch, training.total_images) == (batch, batch * steps)
    assert (optimizer.kind, optimizer.lr, optimizer.betas) == (kind, lr, (0.9, 0.99))
    assert optimizer.eps == pytest.approx(eps * math.sqrt(values))
    assert optimizer.lr_decay_images == (None if kind == "radam" else 35_000 * batch)
    assert (run.method.noise_levels.mean, run.method.noise_levels.std) == (-1.0, p_std)
    assert run.method.warmup * steps == pytest.approx(10_000)
    assert decay(name) == pytest.approx(0.9999) and training.ema.rampup_ratio is None  # the first, which it evaluates
    assert run.data.labels == (not name.endswith("cifar10")) and not run.data.xflip
    assert (run.network.dropout if run.network else 0.0) == (0.2 if name == "sct-cifar10" else 0.0)
