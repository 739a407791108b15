"""The commands end to end on digits, with a tiny network: what they write, and how they tell mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imagewright
from imagewright.cli.main import COMMANDS, main
from imagewright.data import open_images
from imagewright.metrics import digits_features, frechet_distance
from imagewright.metrics.statistics import moments_of
from imagewright.pretrained import load
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun


@pytest.fixture(scope="module")
def home(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher run and its one-step student, both trained through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    main(["train", str(tiny_recipe), "--out", str(folder / "teacher"), "--device", "cpu"])
    sizes = ["--training.total-images", "32", "--training.batch", "16", "--training.log-images", "16"]
    main(["train", "cd-digits", "--teacher", str(folder / "teacher"), "--out", str(folder / "student"), *sizes])
    return folder


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        code: object = 0
        try:
            main([command, "--help"])
        except SystemExit as stop:
            code = stop.code
        assert code == 0, command
        assert "imagewright" in capsys.readouterr().out, command


def test_a_run_directory_explains_itself(home: Path) -> None:
    run = home / "teacher"
    record = json.loads((run / "experiment.json").read_text())
    assert record["experiment"]["training"]["batch"] == 16
    assert record["command"][0].endswith("tiny.py")
    model = json.loads((run / "model.json").read_text())
    assert model["kind"] == "denoiser"
    assert model["data"]["resolution"] == 8
    assert [p.name for p in sorted((run / "samples").iterdir())] == ["000000000032.png", "000000000064.png"]
    assert len((run / "log.jsonl").read_text().splitlines()) == 4
    assert json.loads((home / "student" / "model.json").read_text())["kind"] == "flow_map"


def test_sample_writes_pictures_and_goes_on(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    args = ["sample", str(home / "student"), "--n", "5", "--label", "3", "--out", str(out), "--npz", "--trajectory"]
    main(args)
    stored = np.load(out / "samples.npz", allow_pickle=False)
    assert stored["images"].shape == (5, 8, 8, 1)
    assert stored["labels"].tolist() == [3] * 5
    first = np.asarray(Image.open(out / "000002.png"))
    assert np.array_equal(first, stored["images"][2, :, :, 0])
    assert Image.open(out / "grid.png").width > 64
    assert (out / "trajectory.png").exists()
    (out / "000002.png").unlink()
    main([*args, "--batch-size", "1"])
    assert np.array_equal(np.asarray(Image.open(out / "000002.png")), first)


def test_many_samples_are_not_flushed_one_by_one_nor_all_on_the_grid(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    monkeypatch.setattr("imagewright.cli.sample.GRID", 4)
    args = ["sample", str(home / "teacher"), "--steps", "2", "--n", "12", "--out", str(tmp_path)]
    main(args)
    assert len(flushed) == 2  # samples.json and grid.png
    assert "grid of the first 4" in capsys.readouterr().out
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (8 * 19, 8 * 19)  # two rows of two, each of 8 + 1 pixels, and a border, 8 times as large
    before = (tmp_path / "000007.png").read_bytes()
    (tmp_path / "000007.png").write_bytes(b"")  # as a power failure may leave it
    main(args)
    assert (tmp_path / "000007.png").read_bytes() == before


def test_samples_of_another_kind_are_not_mixed(home: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = str(tmp_path / "samples")
    main(["sample", str(home / "student"), "--n", "1", "--out", out])
    assert "seed" in refused("sample", str(home / "student"), "--n", "1", "--seed", "1", "--out", out)


def test_evaluate_and_report(home: Path) -> None:
    main(["evaluate", str(home / "teacher"), "--n", "40", "--steps", "2", "3", "--metrics", "fd", "prdc"])
    main(["evaluate", str(home / "student"), "--n", "40", "--metrics", "fd"])
    found = json.loads((home / "teacher" / "metrics.json").read_text())
    assert [entry["nfe"] for entry in found["reports"]] == [3, 5]
    report = found["reports"][0]["report"]
    assert report["num_images"] == 40
    classes = found["reports"][0]["classes"]
    assert classes["law"] == "reference" and classes["shares"][8] == round(174 / 1797, 6)
    assert report["scores"]["fd_digits"] == pytest.approx(fd_by_hand(home / "teacher", steps=2, n=40), rel=1e-6)
    assert set(report["yardsticks"]["fd_digits"]) >= {"floor", "gaussian", "noise"}
    main(["report", str(home / "teacher"), str(home / "student"), "--out", str(home / "report.html")])
    assert "<html" in (home / "report.html").read_text()


def fd_by_hand(model: Path, steps: int, n: int) -> float:
    """fd_digits of n images of seed 1 whose classes come as in the whole set of digits."""
    images, generator = open_images("digits", split="all"), load(model, Heun(num_steps=steps))
    shares = np.bincount(images.labels) / len(images)
    drawn = generator.generate(n, labels=generator.labels(n, 1, shares=shares), seed=1)
    features = digits_features()
    return frechet_distance(moments_of(features(drawn)[0]), moments_of(features(images.images())[0]))


def test_samples_are_held_against_the_classes_that_were_asked_for(
    home: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "metrics.json"
    words = ["--n", "12", "--metrics", "accuracy", "--steps", "2", "--classes", "uniform", "--out", str(out)]
    main(["evaluate", str(home / "teacher"), *words])
    (entry,) = json.loads(out.read_text())["reports"]
    generator = load(home / "teacher", Heun(num_steps=2))
    seen = digits_features()(generator.generate(12, seed=1))[1].argmax(1)
    assert entry["report"]["scores"]["accuracy_digits"] == pytest.approx((seen == generator.labels(12, 1)).mean())
    main(["data", "convert", "digits", str(tmp_path / "digits.zip")])
    told = refused("evaluate", tmp_path / "digits.zip", "--data", "digits", "--metrics", "accuracy")
    assert "is a set of images, of which no classes were asked; accuracy is a model's" in told


def test_uniform_classes_are_kept_beside_the_reference_s(home: Path, tmp_path: Path) -> None:
    args = ["evaluate", str(home / "teacher"), "--n", "20", "--metrics", "fd", "--no-yardsticks", "--steps", "2"]
    out = tmp_path / "metrics.json"
    for classes in ("reference", "uniform", "uniform"):
        main([*args, "--classes", classes, "--out", str(out)])
    reports = json.loads(out.read_text())["reports"]
    assert [(entry["classes"]["law"], entry["classes"]["shares"][0]) for entry in reports] == [
        ("reference", round(178 / 1797, 6)),
        ("uniform", 0.1),
    ]
    for entry in reports:  # as written before classes were recorded
        del entry["classes"]
    out.write_text(json.dumps({"format": "imagewright-metrics/1", "reports": reports}))
    main([*args, "--out", str(out)])
    assert [entry["classes"]["law"] for entry in json.loads(out.read_text())["reports"]] == ["reference"]


def test_grey_pictures_of_three_channels_have_the_score_of_grey_ones(tmp_path: Path) -> None:
    pixels, found = open_images("digits", split="test").images(range(20))[..., 0], []
    for mode in ("L", "RGB"):
        (tmp_path / mode).mkdir()
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).convert(mode).save(tmp_path / mode / f"{i:02d}.png")
        out = tmp_path / f"{mode}.json"
        main(["evaluate", str(tmp_path / mode), "--data", "digits", "--metrics", "fd", "--out", str(out)])
        found.append(json.loads(out.read_text())["reports"][0]["report"]["scores"])
    assert found[0] == found[1] and found[0]["fd_digits"] > 0


@pytest.mark.parametrize("option", ["--seed 3", "--steps 4", "--sampler heun", "--classes uniform", "--skip-scale 0.8"])
def test_options_of_drawing_are_refused_for_images(
    option: str, home: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    main(["data", "convert", "digits", str(tmp_path / "digits.zip")])
    told = refused("evaluate", tmp_path / "digits.zip", "--data", "digits", *option.split())
    assert f"{option.split()[0]} has no effect on" in told


def test_data_convert_then_train_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "convert", "digits", str(tmp_path / "digits.zip")])
    capsys.readouterr()
    main(["data", "info", str(tmp_path / "digits.zip")])
    assert "1797 images, 8x8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "edm-digit"], "edm-digits"),
        (["train", "none.py"], "none.py does not exist"),
        (["train", "cd-digits", "--teacher", "nowhere"], "nowhere"),
        (["train", "edm-digits", "--training.batch", "0"], "training.batch is 0; it must be at least 1"),
        (["train", "edm-digits", "--data.source", "no.zip", "--dry-run"], "no.zip"),
        (["train", "--resume", "nowhere"], "experiment.json does not exist"),
        (["sample", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
        (["data", "info", "nowhere"], "nowhere"),
        (["data", "merge"], "allowed: info, convert"),
        (["bench", "memory"], "allowed: speed"),
        (["completion", "fish"], "allowed: bash, zsh"),
    ],
)
def test_mistakes_are_one_sentence(args: list[str], told: str, refused: Callable[..., str]) -> None:
    error = refused(*args)
    assert told in error


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--label", "10"], "--label 10 is not a class"),
        (["--class-name", "ten"], "no class 'ten'"),
        (["--sampler", "huen"], "did you mean 'heun'"),
        (["--set", "stepz=3"], "no setting 'stepz'"),
        (["--sampler", "multistep-consistency"], "draws from a flow map"),
        (["--steps", "0"], "--steps is 0; it must be a whole number >= 1"),
        (["--n", "0"], "--n is 0"),
    ],
)
def test_bad_sampling_options(
    home: Path, args: list[str], told: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert told in refused("sample", str(home / "teacher"), "--out", str(tmp_path), *args)


def test_a_run_is_not_overwritten(home: Path, refused: Callable[..., str]) -> None:
    error = refused("train", "edm-digits", "--out", str(home / "teacher"))
    assert "already holds a run" in error


def test_resume_with_other_settings_is_refused(home: Path, refused: Callable[..., str]) -> None:
    error = refused("train", "--resume", str(home / "teacher"), "--training.seed", "5")
    assert "training.seed" in error


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imagewright", "sample", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nowhere" in done.stderr


def test_completion_names_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert all(name in script for name in (*RECIPES, *COMMANDS))
    checked = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
    assert checked.returncode == 0


def test_export_is_a_model_on_its_own(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    main(["export", str(home / "teacher"), "--out", str(whole)])
    main(["export", str(home / "teacher"), "--out", str(half), "--half"])
    assert sorted(p.name for p in whole.iterdir()) == ["README.md", "model.json", "model.safetensors"]
    assert (half / "model.safetensors").stat().st_size < 0.7 * (whole / "model.safetensors").stat().st_size
    original = imagewright.load(home / "teacher", Heun(num_steps=3)).generate(4)
    np.testing.assert_array_equal(imagewright.load(whole, Heun(num_steps=3)).generate(4), original)
    near = imagewright.load(half, Heun(num_steps=3)).generate(4).astype(int)
    assert np.abs(near - original).max() <= 8
    capsys.readouterr()
    assert "already holds a model" in refused("export", str(home / "teacher"), "--out", str(half))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("claims",), "name at least one claim"),
        (("claims", "nonsense"), "there is no claim 'nonsense'; allowed: edm"),
        (("claims", "edm", "--seeds", "1", "1"), "must be different"),
        (("nonsense",), "there is no `imagewright bench nonsense`; allowed: speed"),
        (("speed", "--rounds", "1"), "--rounds is 1; it must be a whole number >= 3"),
    ],
)
def test_bench_tells_mistakes(args: tuple[str, ...], sentence: str, refused: Callable[..., str]) -> None:
    assert sentence in refused("bench", *args)


def test_bench_lists_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "claims", "--list", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "2206.00364" in shown and "not run" in shown
