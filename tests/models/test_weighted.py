"""Models that are told the strength of guidance: inert at first, their range, their files, one option everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imagewright import load
from imagewright.cli.main import main
from imagewright.models.aligned import AlignedFlowMap
from imagewright.models.description import build, describe
from imagewright.models.files import ModelFile, load_model, save_model
from imagewright.models.preconditioning import EDMPrecond, VPPrecond
from imagewright.models.recast import recast
from imagewright.models.weighted import GuidedDenoiser, at_weight, takes_weight
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.samplers import Euler, Jumps
from imagewright.samplers.generator import sampler_to_json
from imagewright.types import Condition, DataSpec, UserError

DIGITS = DataSpec(name="digits", resolution=8, channels=1, num_classes=10, class_names=tuple("0123456789"))
X, SIGMA = torch.ones(3, 1, 8, 8), torch.ones(3)


def denoiser() -> EDMPrecond:
    torch.manual_seed(0)
    return EDMPrecond(
        SongUNet(SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=8,
                                channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.0))
    )  # fmt: skip


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
    return model


def guided() -> GuidedDenoiser:
    return GuidedDenoiser.from_denoiser(denoiser(), (1.0, 5.0)).eval()


def test_a_model_keeps_its_range_and_its_own_strength() -> None:
    model = at_weight(guided(), 2.5)
    again = build(json.loads(json.dumps(describe(model))))
    assert isinstance(again, GuidedDenoiser) and again.weights == (1.0, 5.0) and again.weight == 2.5
    plain = build(json.loads(json.dumps(describe(AlignedFlowMap.from_teacher(denoiser())))))
    assert isinstance(plain, AlignedFlowMap) and plain.weights is None and not takes_weight(plain)


def test_a_strength_is_the_conditions_or_the_models_own() -> None:
    model = shaken(guided())
    with torch.no_grad():
        own = at_weight(model, 3.0)(X, SIGMA)
        told = model(X, SIGMA, Condition(weight=torch.full((3,), 3.0)))
        mixed = model(X, SIGMA, Condition(weight=torch.tensor([1.0, 3.0, 5.0])))
        usual = model(X, SIGMA)
    assert torch.equal(own, told) and not torch.equal(own, usual)
    torch.testing.assert_close(mixed[1], told[1])
    assert not torch.equal(mixed[0], mixed[2]) and model.weight == 1.0  # the first model is as it was
    assert at_weight(model, 3.0).network is model.network


def test_students_of_other_preconditionings_are_told_too() -> None:
    source = VPPrecond(denoiser().network)
    student = GuidedDenoiser.from_denoiser(recast(source), (1.0, 5.0)).eval()
    with torch.no_grad():
        torch.testing.assert_close(at_weight(student, 4.0)(X, SIGMA), source.eval()(X, SIGMA), rtol=1e-4, atol=1e-5)
        shaken(student.network)
        assert not torch.equal(at_weight(student, 4.0)(X, SIGMA), student(X, SIGMA))


def test_strengths_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"weight is 5\.5; this model was trained for 1 to 5"):
        at_weight(guided(), 5.5)
    with pytest.raises(UserError, match="weight is 0; this model"), torch.no_grad():
        guided()(X, SIGMA, Condition(weight=torch.tensor([1.0, 0.0, 2.0])))
    with pytest.raises(UserError, match="EDMPrecond, is told no strength"):
        at_weight(denoiser(), 2.0)
    with pytest.raises(UserError, match="told no strength of guidance"):
        at_weight(AlignedFlowMap.from_teacher(denoiser()), 2.0)
    with pytest.raises(UserError, match="two finite numbers"):
        GuidedDenoiser(denoiser().network, weights=(3.0, 1.0))
    with pytest.raises(UserError, match="weight is nan"):
        at_weight(guided(), float("nan"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided denoiser, a map that is told the strength, and a model that is not."""
    folder = tmp_path_factory.mktemp("weighted")
    student = AlignedFlowMap.from_teacher(denoiser(), (1.0, 3.0))
    for name, model, sampler in (
        ("guided", shaken(guided()), Euler(levels=(80.0, 1.0))),
        ("map", shaken(student), Jumps(num_steps=2)),
        ("plain", denoiser(), Euler(num_steps=2)),
    ):
        save_model(folder / name, ModelFile(model=model, spec=DIGITS, sampler=sampler_to_json(sampler)))
    return folder


def call(*words: object) -> None:
    main([str(word) for word in words])


@pytest.mark.parametrize("name", ["guided", "map"])
def test_one_option_in_sample_and_the_python_api(name: str, models: Path, tmp_path: Path) -> None:
    for weight in (1, 3):
        call(
            "sample",
            models / name,
            "--n",
            2,
            "--label",
            3,
            "--weight",
            weight,
            "--npz",
            "--out",
            tmp_path / str(weight),
        )
    record = json.loads((tmp_path / "3/samples.json").read_text())
    assert record["weight"] == 3
    first, second = ((tmp_path / w / "000000.png").read_bytes() for w in ("1", "3"))
    assert first != second
    drawn = load(models / name, weight=3).generate(2, labels=3)
    assert np.array_equal(np.load(tmp_path / "3/samples.npz")["images"], drawn)


def test_what_does_not_fit_is_told_in_one_sentence(models: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ["--n", 1, "--out", tmp_path]
    commands: list[list[object]] = [
        ["sample", models / "map", *out],
        ["evaluate", models / "map", "--n", 8],
        ["report", models / "map"],
        ["edit", models / "map", "--task", "interpolate", "--label", 1, "--n", 2, "--out", tmp_path],
    ]
    for command in commands:
        assert "weight is 3.5; this model was trained for 1 to 3" in refused(*command, "--weight", 3.5)
    assert "is told no strength of guidance" in refused(
        "edit", models / "plain", "--task", "denoise", "--index", 1, "--weight", 2
    )
    assert "--weight needs --guidance auto" in refused("sample", models / "plain", *out, "--weight", 2)
    assert "no model of these runs is told" in refused("report", models / "plain", "--weight", 2)
    told = refused("sample", models / "guided", *out, "--guidance", "cfg", "--weight", 2)
    assert "--guidance cfg has no effect: this model is told the strength" in told
    with pytest.raises(UserError, match="trained for 1 to 5"):
        load(models / "guided", weight=9)


def test_edits_and_the_page_say_the_strength(models: Path, tmp_path: Path) -> None:
    call("edit", models / "map", "--task", "interpolate", "--label", 1, "--n", 2, "--weight", 2, "--out", tmp_path)
    assert json.loads((tmp_path / "interpolate.json").read_text())["weight"] == 2
    call("report", models / "map", "--weight", 2.5, "--out", tmp_path / "page.html")
    assert "told the strength of guidance, 1 to 3, here 2.5" in (tmp_path / "page.html").read_text()


def test_scores_and_pairs_say_the_strength(models: Path, tmp_path: Path) -> None:
    few = ["--n", 4, "--metrics", "fd", "--no-yardsticks"]
    for weight in (1, 3):
        call("evaluate", models / "guided", *few, "--weight", weight, "--out", tmp_path / "scores.json")
    first, second = json.loads((tmp_path / "scores.json").read_text())["reports"]
    assert [entry["sampler"]["weight"] for entry in (first, second)] == [1, 3]
    assert first["report"]["scores"] != second["report"]["scores"]
    call("couple", models / "guided", "--n", 2, "--weight", 3, "--out", tmp_path / "pairs")
    assert json.loads((tmp_path / "pairs" / "manifest.json").read_text())["origin"]["weight"] == 3


def test_tuned_jumps_come_with_their_strength(models: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    found = tmp_path / "jumps.json"
    call("tune", "jumps", models / "map", "--n", 16, "--steps", 2, "--gammas", 0, 1, "--strengths", 2, "--out", found)
    record = json.loads(found.read_text())
    assert record["sampler"]["num_steps"] == 2 and record["weight"] in (1.0, 3.0)
    assert record["sampler"]["gamma"] in (0.0, 1.0) and 3 <= len(record["found"]["measured"]) <= 4
    call("sample", models / "map", "--sampler", found, "--n", 1, "--out", tmp_path / "s")
    told = refused("sample", models / "map", "--sampler", found, "--weight", 2, "--n", 1, "--out", tmp_path / "t")
    assert "--weight does not go with it" in told
    assert load_model(models / "map").model.weight == 1.0
