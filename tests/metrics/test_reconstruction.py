"""What comes back of pictures: closed forms, orders, and who is asked for what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.cli.main import main
from imagewright.data import ImageSet, open_images
from imagewright.metrics import digits_features
from imagewright.metrics.probe import probe_accuracy
from imagewright.metrics.reconstruction import measure_reconstruction, psnr
from imagewright.models.files import ModelFile, save_model
from imagewright.models.kl import GaussianAutoencoder
from imagewright.models.vq import VQTokenizer
from imagewright.networks import KLAutoencoder, KLAutoencoderConfig, VQAutoencoder, VQAutoencoderConfig
from imagewright.types import ModelKind


class Dims(nn.Module):
    """Gives pictures back dimmer; its latents are their pixels."""

    kind: ClassVar[ModelKind] = "autoencoder"
    latent = (1, 8, 8)

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def encode(self, images: Tensor, noise: Any = None) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.factor


def digits(split: str, n: int) -> ImageSet:
    return open_images("digits", split=split).subset(range(n))  # type: ignore[arg-type]


def test_psnr_of_known_errors() -> None:
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.2), torch.zeros(1, 4, 4)])
    assert psnr(a, b).tolist() == pytest.approx([20.0, 120.0])


def test_a_perfect_copy_scores_best_and_a_worse_one_worse() -> None:
    pytest.importorskip("torchmetrics")
    known, new = digits("train", 400), digits("test", 100)
    scores = [measure_reconstruction(Dims(f), new, known, digits_features()).scores for f in (1.0, 0.8, 0.4)]
    best = scores[0]
    assert best["psnr"] == pytest.approx(120) and best["ssim"] == pytest.approx(1) and best["perceptual"] == 0
    assert best["rfd_digits"] < 1e-6 and best["probe"] > 0.8
    for better, worse in pairwise(scores):
        assert better["psnr"] > worse["psnr"] and better["ssim"] > worse["ssim"]
        assert better["perceptual"] < worse["perceptual"] and better["rfd_digits"] < worse["rfd_digits"]


def test_the_probe_reads_classes_that_lie_in_a_line_and_no_others() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((600, 8)), rng.integers(0, 3, 600)
    told = rows.copy()
    told[np.arange(600), labels] += 6
    assert probe_accuracy(told[:400], labels[:400], told[400:], labels[400:]) > 0.97
    assert probe_accuracy(rows[:400], labels[:400], rows[400:], labels[400:]) < 0.5
    hidden = np.where(np.arange(600) % 2, labels, -1)  # which do not count
    assert probe_accuracy(told[:400], hidden[:400], told[400:], hidden[400:]) > 0.97


def test_what_cannot_be_measured_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    new = digits("test", 10)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bare = replace(new, spec=replace(new.spec, name="photos"))
    report = measure_reconstruction(Dims(1.0), bare, None, digits_features())
    assert sorted(report.scores) == ["psnr", "rfd_digits"]
    assert [note.split(":")[0] for note in report.notes] == ["ssim", "perceptual", "probe"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, spec = tmp_path_factory.mktemp("models"), open_images("digits").spec
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_resolution": 8, "in_channels": 1, "model_channels": 8, "channel_mult": (1, 1)}
    auto = GaussianAutoencoder(KLAutoencoder(KLAutoencoderConfig(**sizes, num_blocks=1, latent_channels=2)))
    codec = VQTokenizer(VQAutoencoder(VQAutoencoderConfig(**sizes, num_blocks=1, codebook_size=8, codebook_dim=4)))
    for name, model in (("auto", auto), ("codec", codec)):
        save_model(root / name, ModelFile(model=model, spec=replace(spec, num_classes=0, class_names=())))
    return {"auto": root / "auto", "codec": root / "codec"}


@pytest.mark.parametrize(("name", "latent"), [("auto", [2, 4, 4]), ("codec", [16])])
def test_evaluate_measures_autoencoders_and_tokenizers(
    models: dict[str, Path], name: str, latent: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the same measurement takes the place of the first
        main(["evaluate", str(models[name]), "--n", "40", "--device", "cpu"])
    assert "psnr" in capsys.readouterr().out
    entries = json.loads((models[name] / "metrics.json").read_text())["reconstructions"]
    assert len(entries) == 1
    report = entries[0]["report"]
    assert report["latent"] == latent and report["split"] == "test" and report["num_images"] == 40
    assert {"psnr", "rfd_digits", "probe", "perceptual"} <= report["scores"].keys()


def test_what_does_not_fit_is_said(models: dict[str, Path], refused: Callable[..., str]) -> None:
    told = refused("evaluate", models["auto"], "--n", "1")
    assert "--n is 1; there are" in told and "so it must be 2 to that" in told
    assert "--steps has no effect on" in refused("evaluate", models["codec"], "--steps", "3")
    assert "--metrics has no effect on" in refused("evaluate", models["auto"], "--metrics", "fd")
