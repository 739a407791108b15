"""Every command takes a model in an autoencoder's latents as any other, without a flag."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagewright.cli.edit_latents import places
from imagewright.cli.main import main
from imagewright.data import open_images
from imagewright.data.config import DataConfig
from imagewright.data.couplings import Couplings
from imagewright.methods.edm import EDM
from imagewright.methods.improved_consistency import ImprovedConsistencyTraining
from imagewright.models.files import ModelFile, save_model
from imagewright.models.kl import GaussianAutoencoder
from imagewright.models.latents import LatentSpace
from imagewright.networks import KLAutoencoder, KLAutoencoderConfig, SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.training.experiment import Experiment, run_experiment

DIGITS = open_images("digits").spec


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An autoencoder, a denoiser and a consistency model in its latents, after a step."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    config = KLAutoencoderConfig(
        img_resolution=8, in_channels=1, latent_channels=3, model_channels=8, channel_mult=(1, 1), num_blocks=1,
        attn_resolutions=(),
    )  # fmt: skip
    save_model(root / "auto", ModelFile(model=GaussianAutoencoder(KLAutoencoder(config)), spec=DIGITS))
    network = SongUNetConfig(
        img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,), num_blocks=1,
        attn_resolutions=(), dropout=0.0, label_dropout=0.1,
    )  # fmt: skip
    training = replace(RECIPES["edm-digits"]().training, total_images=16, batch=16)
    data = DataConfig(source="digits", latents=str(root / "latents"))
    found = {"auto": root / "auto"}
    for name, method, sampler in (
        ("denoiser", EDM(), Heun(num_steps=2)),
        ("map", ImprovedConsistencyTraining(s0=4, s1=16), MultistepConsistency()),
    ):
        run = Experiment(data=data, method=method, network=network, sampler=sampler, training=training,
                         given={"autoencoder": str(root / "auto")})  # fmt: skip
        found[name] = run_experiment(run, root / name)
    return found


def test_evaluate_report_and_trajectories_show_images(runs: dict[str, Path], tmp_path: Path) -> None:
    denoiser = str(runs["denoiser"])
    main(["evaluate", denoiser, "--n", "20", "--metrics", "fd", "--no-yardsticks", "--device", "cpu"])
    entry = json.loads((runs["denoiser"] / "metrics.json").read_text())["reports"][-1]
    assert entry["report"]["scores"]["fd_digits"] > 0
    main(["report", denoiser, "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size > 10_000
    main(["sample", denoiser, "--n", "1", "--trajectory", "--guidance", "cfg", "--weight", "2", "--device", "cpu",
          "--out", str(tmp_path / "drawn")])  # fmt: skip
    assert Image.open(tmp_path / "drawn/000000.png").size == (8, 8)


def test_pairs_are_of_latents(runs: dict[str, Path], tmp_path: Path) -> None:
    main(["couple", str(runs["denoiser"]), "--n", "3", "--out", str(tmp_path / "drawn"), "--device", "cpu"])
    assert Couplings(tmp_path / "drawn").read([2]).images.shape == (1, 3, 4, 4)
    main(["couple", str(runs["denoiser"]), "--n", "3", "--invert", "digits", "--out", str(tmp_path / "real"),
          "--device", "cpu", "--dtype", "float32"])  # fmt: skip
    pairs = Couplings(tmp_path / "real").read([0, 1, 2])
    assert pairs.images.shape == pairs.latents.shape == (3, 3, 4, 4)


@pytest.mark.parametrize("task", ["inpaint", "outpaint", "stroke", "denoise", "interpolate"])
def test_edits_return_images(runs: dict[str, Path], tmp_path: Path, task: str) -> None:
    picture = [] if task == "interpolate" else ["--index", "3"]
    main(["edit", str(runs["map"]), "--task", task, *picture, "--n", "2", "--label", "1", "--out", str(tmp_path),
          "--device", "cpu"])  # fmt: skip
    results = [np.asarray(Image.open(tmp_path / f"{task}-{i}.png")) for i in range(2)]
    assert results[0].shape == ((8, 12) if task == "outpaint" else (8, 8))
    if task == "inpaint":  # what was known is as it was
        before = open_images("digits", split="test").images([3])[0, ..., 0]
        assert np.array_equal(results[0][:, :4], before[:, :4]) and not np.array_equal(results[0], before)


def test_a_region_is_drawn_anew_with_the_places_next_to_it() -> None:
    torch.manual_seed(0)
    config = KLAutoencoderConfig(img_resolution=16, in_channels=1, latent_channels=2, model_channels=4,
                                 channel_mult=(1, 1, 1), num_blocks=1, attn_resolutions=())  # fmt: skip
    space = LatentSpace(GaussianAutoencoder(KLAutoencoder(config)))
    region = torch.zeros(16, 16, dtype=torch.bool)
    region[0, 0] = True
    assert places(region, space).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert places(region, None) is region


def test_searches_score_images(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["tune", "skip", str(runs["denoiser"]), "--steps", "1", "--factors", "1", "--n", "20", "--device", "cpu"])
    assert "lower is better" in capsys.readouterr().out


def test_what_latents_do_not_have_is_said(runs: dict[str, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    denoiser, flow_map = runs["denoiser"], runs["map"]
    told = refused("edit", flow_map, "--task", "upscale", "--index", "1")
    assert "lives in an autoencoder's latents, which have no pixels to keep; --task upscale has" in told
    told = refused("evaluate", denoiser, "--metrics", "bpd")
    assert "lives in an autoencoder's latents; how probable it finds images has no measure" in told
    told = refused("export", denoiser, "--format", "onnx", "--out", tmp_path / "x.onnx")
    assert "lives in an autoencoder's latents; --format onnx has no place for it, model has" in told
    told = refused("sample", denoiser, "--guidance", "auto", "--guide", "emoji64-32", "--weight", "2")
    assert "guide emoji64-32 has resolution 32; the model has 8" in told
    told = refused("train", "vq-digits", "--autoencoder", runs["auto"])
    assert "has no option --autoencoder" in told
    told = refused("sample", runs["auto"])
    assert "draws no images; it turns images into latents and back" in told
