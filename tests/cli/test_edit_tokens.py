"""`sample`, `edit`, `evaluate` and `report` on token models and a tokenizer: no flag says which kind it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from imagewright.cli.main import main
from imagewright.models.causal import CausalTokenModel
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.files import ModelFile, save_model
from imagewright.models.masked import MaskedTokenModel
from imagewright.models.tokens import PixelCodec
from imagewright.networks import SongUNet, SongUNetConfig, TokenTransformer, TokenTransformerConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import MaskedDecoding
from imagewright.samplers.generator import sampler_to_json
from imagewright.training.experiment import run_experiment
from imagewright.types import DataSpec

DIGITS = DataSpec(name="digits", resolution=8, channels=1, num_classes=10, class_names=tuple("0123456789"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked and a causal model of pixels, a consistency model, a run of a tokenizer and of a model on its tokens."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = TokenTransformerConfig(values=256, length=64, label_dim=10, width=8, depth=1, heads=1, dropout=0.0)
    unet = SongUNet(
        SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, label_dim=10, model_channels=8,
                       channel_mult=(1,), num_blocks=1, attn_resolutions=())
    )  # fmt: skip
    masked = MaskedTokenModel(TokenTransformer(config), PixelCodec(8, 1))
    save_model(folder / "masked", ModelFile(model=masked, spec=DIGITS, sampler=sampler_to_json(MaskedDecoding())))
    causal = CausalTokenModel(TokenTransformer(replace(config, causal=True)), PixelCodec(8, 1))
    save_model(folder / "causal", ModelFile(model=causal, spec=DIGITS))
    save_model(folder / "consistency", ModelFile(model=ConsistencyModel(unet), spec=DIGITS))
    vq = RECIPES["vq-digits"]()
    short = {"total_images": 16, "batch": 16}
    network = replace(vq.network, model_channels=4, codebook_size=6, codebook_dim=4)
    method = replace(vq.method, discriminator_width=4)
    run = replace(vq, network=network, method=method, training=replace(vq.training, **short))
    run_experiment(run, folder / "vq")
    learner = RECIPES["maskgit-digits"]()
    tokens = replace(learner, network=replace(config, dropout=0.1),
                     training=replace(learner.training, **short)).giving(tokenizer=str(folder / "vq"))  # fmt: skip
    run_experiment(tokens, folder / "maskgit")
    return folder


def call(*words: object) -> None:
    main([str(w) for w in words])


def edited(model: Path, out: Path, *words: object, n: int = 2) -> npt.NDArray[np.uint8]:
    call("edit", model, "--index", 3, "--n", n, "--out", out, "--device", "cpu", *words)
    task = words[words.index("--task") + 1]
    return np.stack([np.asarray(Image.open(out / f"{task}-{i}.png")) for i in range(n)])


def original(index: int = 3) -> npt.NDArray[np.uint8]:
    from imagewright.data import open_images

    return open_images("digits", split="test").images([index])[0, :, :, 0]


def test_pixels_outside_the_mask_stay_and_results_depend_on_the_seed_alone(models: Path, tmp_path: Path) -> None:
    words = ("--task", "inpaint", "--mask", "left")
    results = edited(models / "masked", tmp_path / "a", *words)
    assert (results[:, :, 4:] == original()[:, 4:]).all() and (results[0] != results[1]).any()
    fewer = edited(models / "masked", tmp_path / "b", *words, n=1)
    assert (fewer[0] == results[0]).all()
    other = edited(models / "masked", tmp_path / "c", *words, "--seed", 1)
    assert (other != results).any()
    record = json.loads((tmp_path / "a/inpaint.json").read_text())
    assert record["task"] == "inpaint" and record["mask"] == "left"
    assert Image.open(tmp_path / "a/inpaint.png").size[0] > Image.open(tmp_path / "a/inpaint.png").size[1]


@pytest.mark.parametrize("model", ["masked", "maskgit", "consistency"])
def test_the_same_command_extends_pictures_by_any_model(model: str, models: Path, tmp_path: Path) -> None:
    wide = edited(models / model, tmp_path / "wide", "--task", "outpaint", "--label", 7)
    assert wide.shape == (2, 8, 12)
    if model != "maskgit":  # a lossy codec blends at the border
        assert (wide[:, :, :8] == original()).all()
    high = edited(models / model, tmp_path / "high", "--task", "outpaint", "--mask", "top", "--steps", 3)
    assert high.shape == (2, 12, 8)


def test_a_model_of_codes_edits_under_another_class(models: Path, tmp_path: Path) -> None:
    words = ("--task", "inpaint", "--mask", "centre", "--label", 5, "--steps", 4)
    results = edited(models / "maskgit", tmp_path / "a", *words)
    assert results.shape == (2, 8, 8)
    assert json.loads((tmp_path / "a/inpaint.json").read_text())["label"] == 5


def test_a_causal_model_draws_what_is_missing(models: Path, tmp_path: Path) -> None:
    words = ("--task", "inpaint", "--mask", "bottom")
    results = edited(models / "causal", tmp_path / "a", *words)
    assert (results[:, :4] == original()[:4]).all() and (results[0] != results[1]).any()
    assert np.array_equal(results, edited(models / "causal", tmp_path / "b", *words))
    assert edited(models / "causal", tmp_path / "c", "--task", "outpaint", n=1).shape == (1, 8, 12)


def test_what_a_model_cannot_do_is_told(models: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    def told(model: str, *words: object) -> str:
        return refused("edit", models / model, "--index", 0, "--out", tmp_path, *words)

    assert "it knows --task inpaint and outpaint, not colourise" in told("masked", "--task", "colourise")
    assert "--levels has no effect on a masked token model" in told("masked", "--task", "inpaint", "--levels", 2.0)
    assert "--steps has no effect on a causal token model" in told("causal", "--task", "inpaint", "--steps", 4)
    assert "draws nothing; it turns images into tokens" in told("vq", "--task", "inpaint")
    assert "--task outpaint goes on beyond left, right, top or bottom" in told(
        "masked", "--task", "outpaint", "--mask", "centre"
    )
    assert "--steps is 0; it must be a whole number >= 1" in told("masked", "--task", "inpaint", "--steps", 0)


def test_the_other_commands_find_out_by_themselves(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    call("sample", models / "maskgit", "--n", 4, "--out", tmp_path / "s", "--device", "cpu", "--trajectory")
    told = capsys.readouterr().out
    assert "(8 network calls each)" in " ".join(told.split()) and (tmp_path / "s/trajectory.png").exists()
    call("sample", models / "maskgit", "--n", 2, "--steps", 3, "--set", "guidance=2", "--out", tmp_path / "g")
    assert "(6 network calls each)" in " ".join(capsys.readouterr().out.split())
    assert "guidance is 2; it needs a model whose class was at times hidden" in refused(
        "sample", models / "masked", "--n", 1, "--set", "guidance=2", "--out", tmp_path / "x"
    )
    assert "VQTokenizer draws no images" in refused("sample", models / "vq", "--out", tmp_path / "v")
    call("report", models / "vq", "--out", tmp_path / "vq.html")
    assert "It turns images into tokens and back, and draws no images" in (tmp_path / "vq.html").read_text()
    call("report", models / "maskgit", "--out", tmp_path / "maskgit.html")
    assert "and draws no images" not in (tmp_path / "maskgit.html").read_text()
