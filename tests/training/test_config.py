"""The learning rate over a run, and the sentences that bad settings get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from imagewright.recipes import RECIPES
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.record import to_json
from imagewright.training.schedule import as_begun, shortened
from imagewright.types import UserError


def test_rate_ramps_decays_and_cools_down() -> None:
    config = OptimizerConfig(lr=2.0, lr_ramp_images=100, lr_decay_images=400, lr_cooldown_images=200)
    rates = [config.lr_at(n, 2000) for n in (0, 50, 100, 400, 1600, 1800, 1900, 2000, 2100)]
    assert rates == pytest.approx([0, 1, 2, 2, 1, 2 * (400 / 1800) ** 0.5, (400 / 1900) ** 0.5, 0, 0])


def test_rate_may_cool_down_as_half_a_cosine() -> None:
    config = OptimizerConfig(lr=2.0, lr_cooldown_images=120, lr_cooldown_shape="cosine")
    assert [config.lr_at(n, 200) for n in (0, 80, 120, 140, 180, 200)] == pytest.approx(
        [2, 2, 1.5, 1, 1 - 0.75**0.5, 0]
    )


def test_rate_may_cool_down_to_a_share_of_itself() -> None:
    """VATT's: from 1e-4 to 5e-5, by half a cosine in the code and by a quarter in the paper."""
    for shape, between in (("cosine", 0.5 + 0.5 * 0.5), ("quarter", 0.5 + 0.5 * 0.5**0.5)):
        config = OptimizerConfig(lr=2.0, lr_cooldown_images=100, lr_cooldown_shape=shape, lr_cooldown_to=0.5)  # type: ignore[arg-type]
        assert [config.lr_at(n, 200) for n in (100, 150, 200)] == pytest.approx([2, 2 * between, 1])


def test_rate_falls_in_steps() -> None:
    config = OptimizerConfig(kind="sgd", lr=2.0, lr_step_images=100, lr_step_factor=0.5)
    # The trainer asks with the batch at hand counted: the hundredth image is of the first hundred.
    assert [config.lr_at(n, 400) for n in (0, 1, 100, 101, 200, 201, 400)] == pytest.approx([2, 2, 2, 1, 1, 0.5, 0.25])
    quarters = TrainingConfig(total_images=400, batch=8, optimizer=OptimizerConfig(lr_step_images=0.25)).in_images()
    assert quarters.optimizer.lr_step_images == 100


def test_rate_is_constant_unless_asked() -> None:
    assert {OptimizerConfig(lr=0.5).lr_at(n, 100) for n in (1, 50, 100)} == {0.5}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: OptimizerConfig(kind="lion"),
            r"optimizer\.kind is 'lion'; allowed: adafactor, adam",
        ),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(lr=0.0), r"optimizer\.lr is 0\.0; it must be positive and finite"),
        (lambda: OptimizerConfig(lr=float("inf")), r"optimizer\.lr is inf"),
        (lambda: OptimizerConfig(lr=float("nan")), r"optimizer\.lr is nan"),
        (lambda: OptimizerConfig(lr_ramp_images=-1), r"lr_ramp_images is -1; it must be >= 0"),
        (lambda: OptimizerConfig(lr_ramp_images=float("nan")), r"lr_ramp_images is nan; it must be >= 0"),
        (lambda: OptimizerConfig(lr_cooldown_images=-1), r"lr_cooldown_images is -1; it must be >= 0"),
        (lambda: OptimizerConfig(lr_cooldown_shape="step"), r"lr_cooldown_shape is 'step'; allowed: linear, cosine"),  # type: ignore[arg-type]
        (lambda: OptimizerConfig(lr_cooldown_to=1.5), r"lr_cooldown_to is 1\.5; it must lie in \[0, 1\]"),
        (lambda: OptimizerConfig(lr_step_images=0), r"lr_step_images is 0; it must be above 0, or none"),
        (lambda: OptimizerConfig(lr_step_factor=0.0), r"lr_step_factor is 0\.0; it must be positive"),
        (lambda: OptimizerConfig(momentum=1.0), r"optimizer\.momentum is 1\.0; it must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(nesterov=True, momentum=0.0), r"optimizer\.nesterov needs a momentum above 0"),
        (lambda: OptimizerConfig(lr_decay_images=0), r"lr_decay_images is 0"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"betas is \(0\.9, 1\.0\); both must lie in \[0, 1\)"),
        (lambda: OptimizerConfig(betas=(-0.1, 0.9)), r"optimizer\.betas is \(-0\.1, 0\.9\)"),
        (lambda: OptimizerConfig(eps=-1.0), r"optimizer\.eps is -1\.0; it must be >= 0 and finite"),
        (lambda: OptimizerConfig(weight_decay=-0.1), r"optimizer\.weight_decay is -0\.1; it must be >= 0 and finite"),
        (lambda: OptimizerConfig(decay_vectors=False), r"optimizer\.decay_vectors has no effect without"),
        (lambda: OptimizerConfig(weight_decay=float("inf")), r"optimizer\.weight_decay is inf"),
        (lambda: OptimizerConfig(clip_norm=0.0), r"clip_norm is 0\.0; it must be positive, or none"),
        (lambda: EmaConfig(halflife_images=-1), r"halflife_images is -1; it must be >= 0"),
        (lambda: EmaConfig(halflife_images=float("nan")), r"ema\.halflife_images is nan"),
        (lambda: EmaConfig(rampup_ratio=0.0), r"ema\.rampup_ratio is 0\.0; it must be positive, or none"),
        (lambda: EmaConfig(power_std=(0.0,)), r"ema\.power_std is \(0\.0,\)"),
        (lambda: EmaConfig(power_std=(0.1, 0.1)), r"power_std is \(0\.1, 0\.1\); no entry may occur twice"),
        (lambda: EmaConfig(power_std=(0.05, 0.3)), r"power_std is .* \(0, 0\.29\)"),
        (lambda: TrainingConfig(total_images=0, batch=1), r"training\.total_images is 0; it must be at least 1"),
        (lambda: TrainingConfig(total_images=9, batch=0), r"training\.batch is 0; it must be at least 1"),
        (lambda: TrainingConfig(total_images=9, batch=8, seed=-1), r"training\.seed is -1; it must be >= 0"),
        (lambda: TrainingConfig(total_images=9, batch=8, micro_batch=3), r"micro_batch is 3; it must divide .* \(8\)"),
        (lambda: TrainingConfig(total_images=9, batch=8, micro_batch=0), r"training\.micro_batch is 0"),
        (
            lambda: TrainingConfig(
                total_images=9, batch=8, parallel="shard", optimizer=OptimizerConfig(kind="adafactor")
            ),
            r"parallel is 'shard', .* allowed: replicate, or another optimiser",
        ),
        (
            lambda: TrainingConfig(total_images=9, batch=8, precision="half"),  # type: ignore[arg-type]
            r"training\.precision is 'half'; allowed: fp32, bf16, fp16",
        ),
    ],
)
def test_bad_settings_are_told(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize("name", ["log_images", "snapshot_images", "checkpoint_images", "keep_checkpoints"])
def test_every_interval_is_at_least_one(name: str) -> None:
    with pytest.raises(UserError, match=rf"training\.{name} is 0; it must be at least 1"):
        TrainingConfig(total_images=9, batch=8, **{name: 0})  # type: ignore[arg-type]


def test_ends_of_the_ranges_are_allowed() -> None:
    assert OptimizerConfig(betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, lr_decay_images=1).betas == (0.0, 0.0)
    assert EmaConfig(halflife_images=0, rampup_ratio=None, power_std=(0.05, 0.289)).halflife_images == 0
    assert TrainingConfig(total_images=1, batch=8, micro_batch=8).micro_batch == 8


def test_a_shorter_run_keeps_its_recipes_shape() -> None:
    recipe = RECIPES["edm-digits"]()
    total = recipe.training.total_images
    short = replace(recipe, training=replace(recipe.training, total_images=total // 10))
    run, changes = shortened(recipe, short)
    assert [run.training.optimizer.lr_at(f * total // 10, total // 10) for f in (0, 0.05, 0.5, 0.8)] == pytest.approx(
        [recipe.training.optimizer.lr_at(int(f * total), total) for f in (0, 0.05, 0.5, 0.8)], rel=2e-3
    )
    assert run.training.ema.halflife_images == recipe.training.ema.halflife_images / 10
    assert "training.optimizer.lr_ramp_images 4,000 -> 400" in changes
    assert as_begun(recipe, to_json(run)) == replace(run, training=replace(run.training, total_images=total))
    kept, _ = shortened(recipe, short, ["training.optimizer.lr_decay_images"])
    assert kept.training.optimizer.lr_decay_images == recipe.training.optimizer.lr_decay_images
    longer = replace(recipe, training=replace(recipe.training, total_images=2 * total))
    assert shortened(recipe, longer) == (longer, [])


@pytest.mark.parametrize("total", [8, 999, 1001, 1003])
def test_rounding_makes_no_run_too_short(total: int) -> None:
    recipe = RECIPES["metaclip2-digits"]()  # whose ramp and cool-down fill it, in shares
    counted = replace(recipe, training=recipe.training.in_images())
    for run in (recipe, counted):
        short, _ = shortened(run, replace(run, training=replace(run.training, total_images=total)))
        rate = short.training.in_images().optimizer
        assert rate.lr_ramp_images + rate.lr_cooldown_images <= total + 1


def test_what_a_method_counts_in_images_shrinks_too() -> None:
    recipe = RECIPES["uni-rkl-digits"]()
    recipe = replace(recipe, method=replace(recipe.method, fake_only_images=1_000, gan_weight=0.01))
    short = replace(recipe, training=replace(recipe.training, total_images=recipe.training.total_images // 4))
    assert shortened(recipe, short)[0].method.fake_only_images == 250


def test_a_rate_that_never_reaches_its_height_is_refused() -> None:
    recipe = RECIPES["edm-digits"]()
    rate = replace(recipe.training.optimizer, lr_cooldown_images=600)
    wrong = replace(recipe, training=replace(recipe.training, total_images=640, optimizer=rate))
    with pytest.raises(UserError, match=r"total_images is 640; the rate's ramp \(\d+ images\) and cool-down \(600\)"):
        shortened(recipe, wrong)
