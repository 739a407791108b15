"""`imagewright train RECIPE --dry-run`: every recipe can be built at its true size, whatever is missing for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from imagewright.cli.dry_run import StandIns, bytes_per_parameter
from imagewright.cli.main import main
from imagewright.metrics.perceptual import lpips_installed
from imagewright.recipes import RECIPES
from imagewright.training.experiment import assemble
from imagewright.types import Trained, UserError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_together(name: str) -> None:
    experiment = RECIPES[name]()
    with torch.device("meta"):
        assembled = assemble(experiment, sources=StandIns())
    product = assembled.parts.roles[experiment.method.product]
    assert isinstance(product, Trained) and all(p.is_meta for p in product.module.parameters())
    if experiment.data.resolution and assembled.space is None:  # latents have a side of their own
        assert assembled.images.spec.resolution == experiment.data.resolution


def test_missing_data_and_models_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "dmd2-imagenet64-gan", "--dry-run"])
    told = capsys.readouterr().out
    assert "not there: images imagenet-64x64.zip" in told
    assert "not there: model runs/dmd2-imagenet64: as recipe dmd2-imagenet64 makes it" in told
    assert "generator: trained, 295.90 M parameters" in told and "GFLOP" in told and "kept for backward" in told


def test_it_tells_what_will_be_built_and_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "edm-emoji64-16", "--data.resolution", "8", "--training.total-images", "1500", "--dry-run"])
    told = capsys.readouterr().out
    assert '"img_resolution": 8' in told and '"label_dim": 9' in told and "8x8x3, 9 classes" in told
    shorter = "in proportion to 1,500 of the recipe's 150,000 images: training.optimizer.lr_ramp_images 5,000 -> 50"
    assert shorter in told
    assert "schedule: 1,500 images, rate 0.001; of them, in images:" in told
    assert "  lr_ramp: 50 (3.3% of the run)" in told
    assert "  lr_cooldown: 600 (40.0% of the run)" in told
    assert re.search(r"  snapshot: [\d,]+ \(longer than the run\)", told)
    assert "time: at least " in told and " on cpu (" in told


def test_what_sharding_and_recomputing_save_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for options in ([], ["--training.parallel", "shard", "--training.recompute"]):
        main(["train", "edm-emoji64-16", "--dry-run", *options])
        told.append(capsys.readouterr().out)
    kept = [float(re.search(r"([\d.]+) MiB kept for backward", text)[1]) for text in told]  # type: ignore[index]
    assert kept[1] < 0.5 * kept[0]
    state, shared = map(int, re.search(r"(\d+) MiB of state \((\d+) MiB of them shared out", told[1]).groups())  # type: ignore[union-attr]
    assert 0.9 * state < shared <= state and "shared out" not in told[0]


def test_a_smaller_students_size_is_told_beside_its_teachers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "slimflow-digits", "--teacher", "runs/edm-digits", "--dry-run"])
    told = capsys.readouterr().out
    assert "flow: trained, 0.19 M parameters" in told
    assert re.search(
        r"teacher: 0.75 M parameters, 0.0\d+ GFLOP an image; what is trained has 25% of the parameters and \d\d% of",
        told,
    )
    main(["train", "slimflow-digits-distil", "--dry-run"])
    assert "what is trained has" not in capsys.readouterr().out  # it has its teacher's size


def test_a_token_model_has_its_cost_told(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "maskgit-imagenet64", "--dry-run"])
    told = capsys.readouterr().out
    assert "model: trained" in told and "GFLOP" in told


@pytest.mark.parametrize("word", ["none", "None"])
def test_an_option_may_be_left_empty(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "sid-digits", "--method.start-sigma", word, "--dry-run"])
    assert '"start_sigma": null' in capsys.readouterr().out


def test_parts_that_do_not_fit_are_refused_as_in_a_run() -> None:
    experiment = replace(RECIPES["cd-imagenet64"]()).giving(teacher="edm-cifar10")
    with pytest.raises(UserError, match="teacher edm-cifar10 makes images of resolution"), torch.device("meta"):
        assemble(experiment, sources=StandIns())


@pytest.mark.parametrize("name", ["lpips", "lpips-average"])
def test_features_to_be_installed_may_be_missing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "dmd-digits", "--features", name, "--dry-run"])
    told = capsys.readouterr().out
    assert lpips_installed() or f"not there: features {name} (features is {name!r}, which needs" in told


def test_a_mistaken_feature_network_is_refused(refused: Callable[..., str]) -> None:
    assert "features is 'nosuch'" in refused("train", "dmd-emoji64-32", "--features", "nosuch", "--dry-run")


def test_parts_without_an_average_take_less_memory() -> None:
    experiment = RECIPES["dmd2-emoji64-32"]()
    with torch.device("meta"):
        roles = assemble(experiment, sources=StandIns()).parts.roles
    found = {name: bytes_per_parameter(role, experiment) for name, role in roles.items()}
    assert found == {"generator": 20, "fake_score": 16, "teacher": 4}
