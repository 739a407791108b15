"""A causal model and bits/dim end to end: train, sample, evaluate, export, report, with no flag for the kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewright.cli.main import main

TINY = """
import dataclasses
from imagewright.networks import TokenTransformerConfig
from imagewright.recipes import RECIPES

run = RECIPES["causal-digits"]()
experiment = dataclasses.replace(
    run,
    network=dataclasses.replace(run.network, width=16, depth=1, heads=2),
    training=dataclasses.replace(run.training, total_images=64, batch=16, log_images=16, snapshot_images=32,
                                 checkpoint_images=32),
)
"""


@pytest.fixture(scope="module")
def home(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a causal run, a denoiser's and that of its one-step student."""
    folder = tmp_path_factory.mktemp("likelihood")
    (folder / "tiny.py").write_text(TINY)
    main(["train", str(folder / "tiny.py"), "--out", str(folder / "causal"), "--device", "cpu"])
    main(["train", str(tiny_recipe), "--out", str(folder / "denoiser"), "--device", "cpu"])
    sizes = ["--training.total-images", "32", "--training.batch", "16", "--training.log-images", "16"]
    main(["train", "cd-digits", "--teacher", str(folder / "denoiser"), "--out", str(folder / "student"), *sizes])
    return folder


def test_a_causal_run_explains_itself(home: Path) -> None:
    model = json.loads((home / "causal" / "model.json").read_text())
    assert model["kind"] == "token_model"
    assert model["sampler"] == {"class": "raster", "temperature": 1.0, "cache": True}
    assert model["model"]["codec"]["class"] == "PixelCodec"
    last = json.loads((home / "causal" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 < last["model/bits_per_token"] < 9
    assert len(list((home / "causal" / "samples").iterdir())) == 2


def test_sample_and_trajectory(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(home / "causal"), tmp_path / "samples"
    main(["sample", run, "--n", "3", "--label", "7", "--out", str(out), "--npz", "--trajectory"])
    assert "64 network calls each" in capsys.readouterr().out
    cached = np.load(out / "samples.npz", allow_pickle=False)["images"]
    # One sheet of 12 columns: tokens have no second estimate.
    picture = Image.open(out / "trajectory.png")
    assert picture.width > 3 * picture.height
    main(["sample", run, "--n", "3", "--label", "7", "--out", str(tmp_path / "b"), "--npz", "--set", "cache=false"])
    assert np.array_equal(np.load(tmp_path / "b" / "samples.npz", allow_pickle=False)["images"], cached)


def test_bits_of_a_causal_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "causal"
    main(["evaluate", str(run), "--metrics", "bpd", "--n", "40"])
    said = capsys.readouterr()
    assert "bits per dimension of" in said.err
    assert "40 images, split test, 8x8, as stored, 8-bit values" in said.out
    record = json.loads((run / "metrics.json").read_text())
    (entry,) = record["likelihoods"]
    assert record["reports"] == []
    assert (entry["report"]["kind"], entry["report"]["stderr"], entry["report"]["split"]) == ("exact", None, "test")
    assert 2 < entry["report"]["bpd"] < 9
    assert set(entry["report"]["codecs"]) == {"png", "webp", "png_sheet", "webp_sheet"}
    # The same again takes its place; another split stands beside it; distances leave both.
    main(["evaluate", str(run), "--metrics", "bpd", "--n", "40"])
    main(["evaluate", str(run), "--metrics", "fd", "bpd", "--n", "40", "--split", "train"])
    record = json.loads((run / "metrics.json").read_text())
    assert sorted(e["report"]["split"] for e in record["likelihoods"]) == ["test", "train"]
    assert [e["nfe"] for e in record["reports"]] == [64]


def test_bits_of_a_denoiser_and_a_report_of_both(home: Path) -> None:
    options = ["--n", "6", "--ode-steps", "4", "--batch-size", "3"]
    main(["evaluate", str(home / "denoiser"), "--metrics", "bpd", *options])
    (entry,) = json.loads((home / "denoiser" / "metrics.json").read_text())["likelihoods"]
    report = entry["report"]
    assert report["kind"] == "probability flow"
    assert report["stderr"] > 0
    assert report["settings"]["trace"] == "Hutchinson, probes: 1"
    assert report["preprocessing"].endswith("dequantised uniformly over their bins")
    main(["evaluate", str(home / "causal"), "--metrics", "bpd", "--n", "6", "--out", str(home / "other.json")])
    main(["report", str(home / "causal"), str(home / "denoiser"), "--out", str(home / "report.html")])
    page = (home / "report.html").read_text()
    for text in ("<h3>Likelihood</h3>", "probability flow", "WebP lossless, all images in one", "bits/dim",
                 "share of tokens that were unknown", "split</th>"):  # fmt: skip
        assert text in page
    main(["report", str(home / "student"), "--out", str(home / "student.html")])
    assert "<h3>Likelihood</h3>" not in (home / "student.html").read_text()


def test_an_exported_model_is_told_from_others_by_itself(home: Path, tmp_path: Path) -> None:
    main(["export", str(home / "causal"), "--out", str(tmp_path / "model")])
    main(["evaluate", str(tmp_path / "model"), "--metrics", "bpd", "--n", "5", "--data", "digits"])
    assert (tmp_path / "model" / "metrics.json").exists()


def test_mistakes_are_told_in_a_sentence(home: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    causal, denoiser, student = (str(home / name) for name in ("causal", "denoiser", "student"))
    lossy = tmp_path / "zip"
    shutil.copytree(home / "causal" / "samples", lossy)
    for args, told in (
        ([student, "--metrics", "bpd"], "a ConsistencyModel jumps along the flow and contains no denoiser"),
        ([causal, "--metrics", "bpd", "--passes", "3"], "passes is 3; it has no effect on an exact likelihood"),
        ([causal, "--metrics", "bpd", "--steps", "3"], "--steps has no effect on bpd"),
        ([causal, "--metrics", "bpd", "--n", "169"], "--n is 169; there are 168 images in split test"),
        ([causal, "--metrics", "fd", "--probes", "2"], "go with --metrics bpd"),
        ([str(lossy), "--metrics", "bpd", "--data", "digits"], "is no model; bpd is how probable a model finds"),
        ([denoiser, "--metrics", "bits"], "metrics has no 'bits'"),
        ([causal, "--metrics", "bpd", "--guidance", "cfg", "--weight", "2"], "guidance needs denoisers"),
    ):
        assert told in refused("evaluate", *args)
    assert "sampler 'raster' takes no --steps; its settings are --set" in refused("sample", causal, "--steps", "3")
    assert "Heun draws from a denoiser" in refused("sample", causal, "--sampler", "heun")
    assert "Raster draws from a token model" in refused("sample", denoiser, "--sampler", "raster")
