"""Published CTM, sCM, AYF and guided runs, digit by digit: the commands of ctm-cifar10 and sony/ctm, FastGen's
configurations, what is known of the others.
"""

from __future__ import annotations

import math

import pytest
import torch

from imagewright.cli.dry_run import StandIns
from imagewright.recipes import RECIPES
from imagewright.training.experiment import assemble


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


@pytest.mark.parametrize(("name", "batch", "lr"), [("ayf-cifar10", 512, 1e-4), ("ayf-imagenet64", 2048, 1e-4)])
def test_ayf(name: str, batch: int, lr: float) -> None:
    """50,000 steps, of which r rises over 10,000, then 3,000 with the adversary; ImageNet-64 is autoguided."""
    run = RECIPES[name]()
    training, method = run.training, run.method
    assert (training.batch, training.total_images, training.optimizer.lr) == (batch, 53_000 * batch, lr)
    assert method.warmup * 53_000 == pytest.approx(10_000) and method.max_r == 0.99 and method.tangent_c == 0.1
    assert method.adversarial.start * 53_000 == pytest.approx(50_000) and method.weights == (1.0, 3.0)
    assert ("weak" in run.given) == (name == "ayf-imagenet64") and method.objective == "eulerian"


@pytest.mark.parametrize(
    ("name", "batch", "lr", "stages"), [("guided-cifar10", 128, 5e-5, 12), ("guided-imagenet64", 2048, 1e-4, 12)]
)
def test_guided(name: str, batch: int, lr: float, stages: int) -> None:
    """50,000 steps a halving of the released rate, those to two and one step twice; stage 1 at 3e-4."""
    run = RECIPES[name]()
    training, method = run.training, run.method
    assert len(method.stages) == stages and method.stages[-4:] == (2, 2, 1, 1)
    halvings = training.total_images / batch * (1 - method.first)
    assert halvings == pytest.approx(50_000 * stages) and training.batch == batch
    assert training.optimizer.lr == 3e-4 and method.halving_rate * 3e-4 == pytest.approx(lr)
    assert training.optimizer.clip_norm == 1.0 and method.anneal and method.weights == (1.0, 5.0)
    assert RECIPES[run.given["teacher"].removeprefix("runs/")]().network.label_dropout == 0.1


def told(noise_channels: int, emb_channels: int) -> int:
    """Parameters of a further number in the embedding."""
    return noise_channels * emb_channels + emb_channels + emb_channels * emb_channels + emb_channels


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("edm2-imagenet64-s", 280_209_253),
        ("edm2-imagenet64-xs", 124_710_821),
        ("align-imagenet64", 280_209_253),
        ("ayf-imagenet64", 280_209_253 + 2 * told(192, 768)),  # the destination, and the strength
        ("guided-imagenet64", 295_899_267 + told(192, 768)),
        ("guided-cifar10", 55_735_299 + told(128, 512)),
    ],
)
def test_students_have_their_teachers_parameters_and_what_they_are_told(name: str, count: int) -> None:
    """EDM2's counts are those of its program."""
    experiment = RECIPES[name]()
    with torch.device("meta"):
        roles = assemble(experiment, sources=StandIns()).parts.roles
    network = roles[experiment.method.product].module.network
    assert sum(p.numel() for p in network.parameters()) == count
