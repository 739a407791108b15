"""Every search from the command line, on a tiny run; what does not fit is told in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imagewright.cli.main import main
from imagewright.data import open_images
from imagewright.models.files import load_model
from imagewright.training.weights import stored

KEEP = ["--training.weights-images", "16", "--training.ema.power-std", "0.05", "0.1"]


def call(*words: object) -> None:
    main([str(w) for w in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """Four steps, weights kept after each, labels dropped now and then."""
    folder = tmp_path_factory.mktemp("tune") / "run"
    call("train", tiny_recipe, "--out", folder, "--device", "cpu", "--network.label-dropout", "0.2", *KEEP)
    return folder


def picture(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "grid.png"))


def test_average_of_any_length(run: Path, tmp_path: Path) -> None:
    call("tune", "ema", run, "--std", "0.07", "--out", tmp_path / "model")
    header = json.loads((tmp_path / "model" / "model.json").read_text())
    assert header["origin"]["average"]["std"] == 0.07
    call("sample", tmp_path / "model", "--n", 2, "--steps", 2, "--out", tmp_path / "s")


def test_combination_of_weights(run: Path, tmp_path: Path) -> None:
    call(
        "tune",
        "lcsc",
        run,
        "--steps",
        2,
        "--evaluations",
        24,
        "--n",
        20,
        "--out",
        tmp_path / "model",
        "--device",
        "cpu",
    )
    header = json.loads((tmp_path / "model" / "model.json").read_text())
    coefficients = header["origin"]["lcsc"]["coefficients"]
    assert len(coefficients) == len(stored(run, "raw")) == 4 and sum(coefficients) == pytest.approx(1.0)
    assert header["sampler"]["num_steps"] == 2
    assert load_model(tmp_path / "model").spec == load_model(run).spec


def test_combination_of_a_consistency_models_weights(run: Path, tmp_path: Path) -> None:
    """Measured in one step, as it is drawn from; the weights are the ones that were asked for."""
    words = ["--teacher", run, "--training.total-images", 96, "--training.batch", 16]
    call("train", "cd-digits", "--out", tmp_path / "cd", "--device", "cpu", "--training.weights-images", 16, *words)
    sizes = ["--evaluations", 22, "--n", 20, "--device", "cpu"]
    call("tune", "lcsc", tmp_path / "cd", "--spacing", 32, "--until", 80, *sizes, "--out", tmp_path / "model")
    header = json.loads((tmp_path / "model" / "model.json").read_text())
    found = header["origin"]["lcsc"]
    assert header["kind"] == "flow_map" and header["sampler"]["class"] == "multistep-consistency"
    assert found["images"] == [16, 48, 80] and len(found["coefficients"]) == 3
    assert found["searched"]["LCSC"] <= found["searched"]["best average"]
    weights = [load_file(tmp_path / "cd" / "weights" / f"raw-{k:012d}.safetensors") for k in found["images"]]
    name = max(weights[0], key=lambda k: weights[0][k].numel())
    expected = sum(c * w[name] for c, w in zip(found["coefficients"], weights, strict=True))
    saved = load_file(tmp_path / "model" / "model.safetensors")[name]
    torch.testing.assert_close(saved, expected)
    two = ["--set", "sigmas=[0.8]", "--evaluations", 20]
    call("tune", "lcsc", tmp_path / "cd", *two, "--n", 20, "--device", "cpu", "--out", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "model.json").read_text())["sampler"]["sigmas"] == [0.8]


def test_skip_factors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("tune", "skip", run, "--steps", 2, "--factors", 0.5, 1.0, "--n", 20, "--device", "cpu")
    assert "--skip-scale" in capsys.readouterr().out


def test_bespoke_solver_is_saved_and_selectable(run: Path, tmp_path: Path) -> None:
    call("tune", "bespoke", run, "--steps", 2, "--iterations", 3, "--batch", 2, "--device", "cpu")
    path = run / "tuned" / "bespoke2-2.json"
    assert json.loads(path.read_text())["sampler"]["class"] == "bespoke"
    call("sample", run, "--sampler", path, "--n", 2, "--out", tmp_path / "s")
    call("evaluate", run, "--sampler", path, "--n", 20, "--metrics", "fd", "--no-yardsticks", "--out", tmp_path / "m")
    assert json.loads((tmp_path / "m").read_text())["reports"][0]["nfe"] == 4


@pytest.mark.parametrize("budget", [(), ("--max-layers", "12")], ids=["times", "times and layers"])
def test_autodiffusion_is_saved_and_selectable(run: Path, tmp_path: Path, budget: tuple[str, ...]) -> None:
    out = tmp_path / "found.json"
    settings = ["--steps", 2, "--generations", 2, "--population", 8, "--n", 4, "--device", "cpu", "--out", out]
    call("tune", "autodiffusion", run, *settings, *budget)
    record = json.loads(out.read_text())
    assert record["sampler"]["class"] == "ddim" and len(record["sampler"]["levels"]) >= 2
    call("sample", run, "--sampler", out, "--n", 2, "--out", tmp_path / "s")


def test_sims_loop_is_one_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tune",
        "sims",
        run,
        "--out",
        tmp_path / "o",
        "--samples",
        24,
        "--budget",
        16,
        32,
        "--n",
        20,
        "--device",
        "cpu",
    ]
    call(*words, "--omega", 1.0)
    assert "omega" in capsys.readouterr().out
    made = open_images(str(tmp_path / "o" / "samples-0.zip"), split="all")
    assert len(made) == 24 and made.spec.num_classes == 10
    assert (tmp_path / "o" / "auxiliary-0-16" / "model.json").exists()
    auxiliary = tmp_path / "o" / "auxiliary-0-32"
    call("sample", run, "--guidance", "auto", "--guide", auxiliary, "--weight", 2, "--n", 2, "--out", tmp_path / "s")
    call(*words, "--omega", 1.0)  # goes on with what is there


def test_self_consuming_generations(run: Path, tmp_path: Path) -> None:
    sizes = ["--samples", 24, "--budget", 32, "--n", 20, "--generations", 2, "--omega", 0.5, "--device", "cpu"]
    call("tune", "sims", run, "--out", tmp_path / "o", *sizes)
    lines = (tmp_path / "o" / "generations.csv").read_text().splitlines()
    assert lines[0] == "generation,plain,sims" and len(lines) == 3
    polluted = open_images(str(tmp_path / "o" / "plain" / "polluted-1.zip"), split="all")
    assert len(polluted) == len(open_images("digits", split="train")) + 24


# --- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_and_interval(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    options = ["--n", 4, "--steps", 3, "--device", "cpu"]
    call("sample", run, *options, "--out", tmp_path / "plain")
    call("sample", run, *options, "--guidance", "cfg", "--weight", 1.0, "--out", tmp_path / "one")
    assert np.array_equal(picture(tmp_path / "plain"), picture(tmp_path / "one"))
    words = ["--sampler", "restart", "--set", "num_steps=8", "--guidance", "auto", "--guide", run, "--weight", 2.0]
    capsys.readouterr()
    call("sample", run, "--n", 4, *words, "--interval", 0.2, 3, "--out", tmp_path / "auto")
    calls = int(capsys.readouterr().out.split("(")[1].split()[0])
    assert 23 < calls < 46  # 23 without a guide, twice as many with one at every level
    call("sample", run, *options, "--skip-scale", 0.5, "--out", tmp_path / "skip")
    record = json.loads((tmp_path / "auto" / "samples.json").read_text())
    assert record["guidance"] == "auto" and len(record["guide_sha256"]) == 64
    told = refused("sample", run, *options, "--skip-scale", 0.4, "--out", tmp_path / "skip")
    assert "holds samples with another skip_scale" in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--guidance", "auto", "--weight", 2], "--guidance auto needs --guide"),
        (["--guidance", "auto", "--guide", "RUN"], "--guidance auto needs --weight; 1 is no guidance"),
        (["--weight", 2], "--weight needs --guidance auto"),
        (["--guided-channels", 1], "--guided-channels needs --guidance auto"),
        (["--guidance", "cfg", "--weight", 2, "--guided-channels", 2], "must be a whole number from 1 to 1"),
        (
            ["--guidance", "auto", "--guide", "emoji64-32", "--weight", 2],
            "guide emoji64-32 has resolution 32; the model",
        ),
        (["--guidance", "cfg", "--weight", 2, "--guide", "RUN"], "--guide goes with --guidance auto"),
        (
            ["--guidance", "cfg", "--weight", 2, "--interval", 90, 100],
            "guidance interval is 90 to 100; the noise range",
        ),
        (
            ["--guidance", "cfg", "--weight", 2, "--interval", 3, 1],
            "interval is 3 to 1; it must satisfy 0 <= low < high",
        ),
        (["--sampler", "restart", "--set", "intervals=[[3,2,0.1,100]]"], "must lie in the noise range of this model"),
        (["--sampler", "restart", "--set", "intervals=[[3,2,0.1]]"], "an entry is [N_restart, K, t_min, t_max]"),
        (["--sampler", "nothing.json"], "nothing.json does not exist"),
        (["--sampler", "RUN/model.json"], "holds no sampler"),
        (["--skip-scale", -1], "skip factors are [-1.0, 1.0]; they must be >= 0"),
        (["--sampler", "restrat"], "there is no sampler 'restrat'; did you mean 'restart'?"),
    ],
)
def test_wrong_combinations_are_told(
    run: Path, tmp_path: Path, refused: Callable[..., str], words: list[object], sentence: str
) -> None:
    given = [str(w).replace("RUN", str(run)) for w in words]
    assert sentence in refused("sample", run, "--n", 2, "--out", tmp_path / "s", "--device", "cpu", *given)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lcsc", "PLAIN", "--out", "OUT"], "there are no stored weights; train with --training.weights-images"),
        (["ema", "PLAIN", "--std", "0.1", "--out", "OUT"], "kept no power-function averages"),
        (["ema", "RUN", "--std", "0.4", "--out", "OUT"], "--std is 0.4; it must lie in (0, 0.29)"),
        (["ema", "RUN", "--std", "0.1", "--images", "3", "--out", "OUT"], "no stored average is from before 3 images"),
        (["ema", "RUN", "--std", "0.1", "--out", "RUN"], "already holds a model; choose another --out"),
        (["bespoke", "emoji64-32"], "emoji64-32 is not a folder to write into; say with --out where the result goes"),
        (["sims", "emoji64-32", "--out", "OUT"], "emoji64-32/experiment.json"),
        (["sims", "RUN", "--omega", "-1", "--out", "OUT"], "every omega above 0"),
        (["skips", "RUN"], "there is no `imagewright tune skips`; did you mean 'skip'?"),
    ],
)
def test_searches_tell_what_is_missing(
    run: Path,
    tmp_path: Path,
    tiny_recipe: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[..., str],
    words: list[str],
    sentence: str,
) -> None:
    if "PLAIN" in words:
        call("train", tiny_recipe, "--out", tmp_path / "plain", "--device", "cpu", "--training.total-images", 16)
    names = {"PLAIN": tmp_path / "plain", "RUN": run, "OUT": tmp_path / "out"}
    capsys.readouterr()
    assert sentence in refused("tune", *(names.get(w, w) for w in words))


def test_classifier_free_guidance_needs_label_dropping(
    tmp_path: Path, tiny_recipe: Path, refused: Callable[..., str]
) -> None:
    call("train", tiny_recipe, "--out", tmp_path / "run", "--device", "cpu", "--training.total-images", 16)
    told = refused("sample", tmp_path / "run", "--guidance", "cfg", "--weight", 2, "--out", tmp_path / "s")
    assert "trained with --network.label-dropout above 0" in told
