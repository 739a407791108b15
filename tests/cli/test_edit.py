"""`imagewright edit` and `tune times` end to end on tiny flow maps, and how they tell mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from imagewright.cli.main import main
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile, save_model
from imagewright.models.preconditioning import EDMPrecond
from imagewright.models.trajectory import TrajectoryModel
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.types import DataSpec

DIGITS = DataSpec(name="digits", resolution=8, channels=1, num_classes=10, class_names=tuple("0123456789"))
COLOUR = DataSpec(name="blobs", resolution=8, channels=3)


def network(spec: DataSpec) -> SongUNet:
    torch.manual_seed(0)
    return SongUNet(
        SongUNetConfig(img_resolution=8, in_channels=spec.channels, out_channels=spec.channels,
                       label_dim=spec.num_classes, model_channels=8, channel_mult=(1,), num_blocks=1,
                       attn_resolutions=())
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser, two consistency models (grey with classes, coloured without) and a trajectory model."""
    folder = tmp_path_factory.mktemp("models")
    denoiser = EDMPrecond(network(DIGITS))
    for name, model, spec in (
        ("denoiser", denoiser, DIGITS),
        ("digits", ConsistencyModel(network(DIGITS)), DIGITS),
        ("colour", ConsistencyModel(network(COLOUR)), COLOUR),
        ("trajectory", TrajectoryModel.from_denoiser(denoiser), DIGITS),
    ):
        save_model(folder / name, ModelFile(model=model, spec=spec))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes, and things that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for side in (4, 8, 16):
        Image.fromarray(values[:side, :side]).save(folder / f"{side}.png")
    Image.fromarray(values[:8, :4]).save(folder / "tall.png")
    Image.fromarray(values[:8, :8, 0]).save(folder / "grey.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 1:7] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "black.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def call(*words: object) -> None:
    main([str(w) for w in words])


def edited(model: Path, out: Path, *words: object, n: int = 2) -> npt.NDArray[np.uint8]:
    """The results [n, H, W(, C)] of one edit; the row is checked against them."""
    call("edit", model, "--out", out, "--n", n, "--device", "cpu", *words)
    task = str(words[list(words).index("--task") + 1])
    results = np.stack([np.asarray(Image.open(out / f"{task}-{i}.png")) for i in range(n)])
    row = np.asarray(Image.open(out / f"{task}.png"))
    shown = n if task == "interpolate" else n + 2
    assert row.shape[:2] == (8 * (8 + 2), 8 * (shown * 9 + 1))
    last = row[8 : 8 + 64 : 8, 8 * ((shown - 1) * 9 + 1) : 8 * ((shown - 1) * 9 + 9) : 8]
    np.testing.assert_array_equal(last, results[-1])
    return results


@pytest.mark.parametrize("mask", ["left", "right", "top", "bottom", "centre", "file"])
def test_inpainting_keeps_what_is_not_masked(models: Path, pictures: Path, tmp_path: Path, mask: str) -> None:
    filled = np.zeros((8, 8), bool)
    parts = {"left": np.s_[:, :4], "right": np.s_[:, 4:], "top": np.s_[:4], "bottom": np.s_[4:],
             "centre": np.s_[2:6, 2:6], "file": np.s_[2:5, 1:7]}  # fmt: skip
    filled[parts[mask]] = True
    name = pictures / "mask.png" if mask == "file" else mask
    picture = np.asarray(Image.open(pictures / "8.png"))
    results = edited(
        models / "colour", tmp_path, "--task", "inpaint", "--image", pictures / "8.png", "--mask", name, "--steps", 3
    )
    for result in results:
        np.testing.assert_array_equal(result[~filled], picture[~filled])
        assert (result[filled] != picture[filled]).mean() > 0.5
    assert not np.array_equal(*results)


def test_upscaling_keeps_the_means_of_blocks(models: Path, pictures: Path, tmp_path: Path) -> None:
    """From a small picture, and from a whole one whose means are taken."""
    small = np.asarray(Image.open(pictures / "4.png")).astype(float)
    whole = np.asarray(Image.open(pictures / "8.png")).astype(float)
    means = whole.reshape(4, 2, 4, 2, 3).mean((1, 3))
    for name, want in (("4.png", small), ("8.png", means)):
        results = edited(models / "colour", tmp_path / name, "--task", "upscale", "--image", pictures / name)
        for result in results:
            got = result.astype(float).reshape(4, 2, 4, 2, 3).mean((1, 3))
            inside = (result > 0).reshape(4, 2, 4, 2, 3).all((1, 3)) & (result < 255).reshape(4, 2, 4, 2, 3).all((1, 3))
            assert inside.sum() > 5 and float(np.abs(got - want)[inside].max()) <= 1


def test_colouring_keeps_the_grey_levels(models: Path, pictures: Path, tmp_path: Path) -> None:
    luma = np.array([0.299, 0.587, 0.114])
    for name in ("8.png", "grey.png"):
        picture = np.asarray(Image.open(pictures / name).convert("RGB")) @ luma
        for result in edited(models / "colour", tmp_path / name, "--task", "colourise", "--image", pictures / name):
            inside = ((result > 0) & (result < 255)).all(-1)
            assert inside.sum() > 5 and float(np.abs(result @ luma - picture)[inside].max()) <= 1
            assert len(np.unique(result.reshape(-1, 3) - result.reshape(-1, 3)[:, :1], axis=0)) > 10
        row = np.asarray(Image.open(tmp_path / name / "colourise.png"))[8 : 8 + 64 : 8, 8 * 10 : 8 * 18 : 8]
        assert (row[..., 0] == row[..., 1]).all() and np.abs(row[..., 0] - picture).max() <= 1


@pytest.mark.parametrize("task", ["inpaint", "upscale", "stroke", "denoise", "interpolate"])
@pytest.mark.parametrize("model", ["digits", "trajectory"])
def test_every_task_is_the_same_again_by_its_seed(models: Path, tmp_path: Path, model: str, task: str) -> None:
    words = ["--task", task, *([] if task == "interpolate" else ["--index", 3])]
    first, again, other = (
        edited(models / model, tmp_path / str(k), *words, "--seed", seed) for k, seed in enumerate((4, 4, 5))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    if task != "interpolate":  # a result depends on its index and the seed alone
        np.testing.assert_array_equal(edited(models / model, tmp_path / "more", *words, "--seed", 4, n=3)[:2], first)
    record = json.loads((tmp_path / "0" / f"{task}.json").read_text())
    assert record["task"] == task and record["seed"] == 4 and 0 <= record["label"] < 10


def test_the_ends_of_an_interpolation_are_drawn_pictures(models: Path, tmp_path: Path) -> None:
    way = edited(models / "digits", tmp_path / "way", "--task", "interpolate", "--label", 3, "--seed", 7, n=5)
    call("sample", models / "digits", "--n", 2, "--label", 3, "--seed", 7, "--out", tmp_path / "s", "--device", "cpu")
    for end, i in ((way[0], 0), (way[-1], 1)):
        drawn = np.asarray(Image.open(tmp_path / "s" / f"{i:06d}.png")).astype(int)
        assert np.abs(end - drawn).max() <= 1
    assert not np.array_equal(way[1], way[2])


def test_levels_and_labels_are_taken_as_given(models: Path, tmp_path: Path) -> None:
    words = ["--task", "stroke", "--index", 0, "--levels", 0.5, 0.25, "--class-name", "7"]
    first = edited(models / "digits", tmp_path / "a", *words)
    record = json.loads((tmp_path / "a" / "stroke.json").read_text())
    assert record["label"] == 7 and record["levels"] == [0.5, 0.25]
    words[-3:-2] = [0.2]
    assert not np.array_equal(first, edited(models / "digits", tmp_path / "b", *words))


def test_mistakes_are_told_in_one_sentence(
    models: Path, pictures: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    digits, colour = models / "digits", models / "colour"
    inpaint = ("--task", "inpaint", "--image", pictures / "8.png")
    known = (*inpaint, "--label", 1)
    for words, sentence in (
        ((models / "denoiser", *inpaint), "is a denoiser; editing needs a flow map"),
        ((tmp_path / "none", *inpaint), "is neither a folder with a model.safetensors nor a shipped model"),
        ((digits, *inpaint), "this model draws by class; say what the picture shows with --label 0 to 9"),
        ((digits, *inpaint, "--label", 10), "--label 10 is not a class of this model; allowed: -1 to 9"),
        ((colour, *inpaint, "--label", 0), "--label 0 is not a class of this model; allowed: -1 (the model has no"),
        ((digits, *inpaint, "--class-name", "ten"), "this model has no class 'ten'"),
        ((digits, *known, "--class-name", "1"), "--label and --class-name do not go together"),
        ((colour, "--task", "inpaint"), "--task inpaint needs one picture: either --image FILE or --index N"),
        ((digits, *known, "--index", 1), "--task inpaint needs one picture"),
        ((digits, "--task", "denoise", "--index", 5000), "--index is 5000; there are"),
        ((colour, "--task", "denoise", "--index", 0), "does not say which images it was trained on"),
        ((digits, *known, "--data", "digits"), "--data says where --index looks"),
        ((digits, *known, "--factor", 2), "--factor has no effect on --task inpaint; it goes with upscale"),
        ((digits, *known, "--sigma", 1), "--sigma has no effect on --task inpaint; it goes with denoise"),
        ((digits, *known, "--steps", 2, "--levels", 1), "--steps and --levels do not go together"),
        ((digits, *known, "--steps", 0), "--steps is 0; it must be a whole number >= 1"),
        ((digits, *known, "--levels", 1, 2), "the levels must be positive and strictly decreasing"),
        ((digits, *known, "--levels", 90), "every level must lie between 0.002 and 80"),
        ((digits, *known, "--mask", "middle"), "--mask is 'middle'; it must be one of left, right"),
        ((digits, *known, "--mask", pictures / "16.png"), "16.png has 16x16 pixels; the model needs 8x8"),
        ((digits, *known, "--mask", pictures / "black.png"), "black.png has no white pixels"),
        ((digits, *known, "--n", 0), "--n is 0"),
        ((digits, *known, "--seed", -1), "--seed is -1"),
        ((digits, "--task", "colourise", "--index", 0), "makes grey pictures; --task colourise needs a model of three"),
        ((digits, "--task", "interpolate", "--n", 1), "an interpolation has at least 2 pictures"),
        ((digits, "--task", "interpolate", "--index", 1), "--index has no effect on --task interpolate"),
        ((digits, "--task", "upscale", "--index", 0, "--factor", 3), "--factor is 3; it must be at least 2 and divide"),
        ((digits, "--task", "denoise", "--index", 0, "--sigma", 0), "--sigma is 0.0; it must be positive and finite"),
        ((digits, "--task", "denoise", "--index", 0, "--sigma", 99), "noise level is 99.0; the model knows 0.002 to"),
    ):
        assert sentence in refused("edit", *words, "--out", tmp_path / "o", "--device", "cpu"), sentence
    for file, sentence in (
        ("16.png", "16.png has 16x16 pixels; the model needs 8x8"),
        ("tall.png", "tall.png has 4x8 pixels"),
        ("broken.png", "broken.png: not a picture"),
        ("missing.png", "missing.png does not exist"),
    ):
        words = ("edit", colour, "--task", "inpaint", "--image", pictures / file, "--out", tmp_path / "o")
        assert sentence in refused(*words), sentence
    assert "the model needs 8x8 or 4x4" in refused(
        "edit", colour, "--task", "upscale", "--image", pictures / "16.png", "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


def test_searched_times_are_saved_and_selectable(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    words = ["--steps", 3, "--points", 6, "--n", 12, "--device", "cpu"]
    call("tune", "times", models / "digits", *words)
    path = models / "digits" / "tuned" / "times-3.json"
    record = json.loads(path.read_text())
    sigmas = record["sampler"]["sigmas"]
    assert record["sampler"]["class"] == "multistep-consistency" and len(sigmas) == 2 and sigmas[0] > sigmas[1]
    scores = {tuple(levels): score for levels, score in record["found"]["measured"]}
    assert [scores[tuple(sigmas[:k])] for k in range(3)] == record["found"]["scores"]
    assert min(s for levels, s in scores.items() if len(levels) == 1) == record["found"]["scores"][1]
    call("sample", models / "digits", "--sampler", path, "--n", 2, "--out", tmp_path / "s", "--device", "cpu")
    assert "3 network calls each" in " ".join(capsys.readouterr().out.split())
    denoiser = ("tune", "times", models / "denoiser", "--n", 12)
    assert "is no flow map; tune times searches the steps of a flow map" in refused(*denoiser)
    assert "steps is 1; a search" in refused("tune", "times", models / "digits", "--steps", 1)
    assert "points is 3; for 3 steps" in refused("tune", "times", models / "digits", "--steps", 3, "--points", 3)
