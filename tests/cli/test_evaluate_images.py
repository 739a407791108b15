"""`imagewright evaluate` of what `sample` wrote, and of other sets of images: what acts, what is refused and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from imagewright.cli.main import main
from imagewright.data import open_images


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of noise in colour, as `sample --npz --trajectory` leaves them."""
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    words = ["--n", "12", "--steps", "1", "--npz", "--trajectory", "--out", str(folder), "--device", "cpu"]
    main(["sample", "emoji64-32", *words])
    return folder


def score(target: Path, out: Path, *more: str, data: str = "emoji64") -> list[dict[str, object]]:
    main(["evaluate", str(target), "--data", data, "--no-yardsticks", "--out", str(out), *more])
    reports: list[dict[str, object]] = json.loads(out.read_text())["reports"]
    return reports


def test_a_folder_and_its_archive_score_alike(drawn: Path, tmp_path: Path) -> None:
    (folder,) = score(drawn, tmp_path / "folder.json", "--metrics", "fd")
    (archive,) = score(drawn / "samples.npz", tmp_path / "npz.json", "--metrics", "fd", "--batch-size", "5")
    assert folder["report"]["scores"] == pytest.approx(archive["report"]["scores"])  # type: ignore[index]
    stored = np.load(drawn / "samples.npz", allow_pickle=False)
    assert np.array_equal(stored["arr_0"], stored["images"]) and len(open_images(drawn)) == 12


def test_measures_of_one_set_add_up(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    score(drawn, out, "--metrics", "fd")
    score(drawn, out, "--metrics", "prdc")
    (entry,) = score(drawn, out, "--metrics", "prdc")  # the same twice is one
    assert {"fd_emoji", "precision"} <= set(entry["report"]["scores"])  # type: ignore[index]
    assert len(score(drawn, out, "--metrics", "prdc", "--split", "test")) == 2
    assert len(score(drawn, out, "--metrics", "fd", "--n", "8")) == 3


def test_what_few_images_allow_is_reported(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    (entry,) = score(drawn, tmp_path / "few.json", "--n", "3")
    assert "left out: prdc needs at least 4 images and 6 real ones, and there are 3" in capsys.readouterr().out
    assert {"fd_emoji", "kd_emoji", "is_emoji"} <= set(entry["report"]["scores"])  # type: ignore[index]
    one = ("evaluate", drawn, "--data", "emoji64", "--n", 1, "--metrics")
    assert "fd needs at least 2 images" in refused(*one, "fd")
    assert "--n is 13; there are 12 images" in refused(*one, "fd", "--n", 13)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--steps", "5"], "steps"),
        (["--sampler", "heun"], "sampler"),
        (["--set", "rho=3"], "set"),
        (["--seed", "3"], "seed"),
        (["--guidance", "cfg", "--weight", "2"], "guidance"),
        (["--skip-scale", "0.5"], "skip-scale"),
        (["--classes", "uniform"], "classes"),
    ],
)
def test_options_of_drawing_are_refused(
    drawn: Path, words: list[str], option: str, refused: Callable[..., str]
) -> None:
    said = refused("evaluate", drawn, "--data", "emoji64", "--metrics", "fd", *words)
    assert f"--{option} has no effect on {drawn}, which is a set of images" in said


def test_the_device_is_looked_at(drawn: Path, refused: Callable[..., str]) -> None:
    said = refused("evaluate", drawn, "--data", "emoji64", "--metrics", "fd", "--device", "cuda:99")
    assert "--device is 'cuda:99'; this machine has" in said


def test_grey_pictures_of_three_channels_are_grey(tmp_path: Path, refused: Callable[..., str]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", arr_0=grey.repeat(3, -1))
    np.savez(tmp_path / "one.npz", arr_0=grey)
    scores = [score(tmp_path / f"{name}.npz", tmp_path / f"{name}.json", "--metrics", "fd", data="digits")[0]
              for name in ("grey", "one")]  # fmt: skip
    assert scores[0]["report"]["scores"] == scores[1]["report"]["scores"]  # type: ignore[index]
    np.savez(tmp_path / "colour.npz", arr_0=np.concatenate([grey, grey, 255 - grey], -1))
    said = refused("evaluate", tmp_path / "colour.npz", "--data", "digits", "--metrics", "fd")
    assert "takes images of 1 channel(s), got 3" in said


@pytest.mark.parametrize("content", [None, "{", '{"format": 3}'])
def test_a_file_that_cannot_take_scores_is_told_before_the_work(
    content: str | None, drawn: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagewright.cli.evaluate.evaluate", lambda *args, **kwargs: pytest.fail("it has begun"))
    out = tmp_path / "scores.json"
    out.mkdir() if content is None else out.write_text(content)
    for target in (drawn, "emoji64-32"):
        said = refused("evaluate", target, "--data", "emoji64", "--n", 2, "--metrics", "fd", "--out", out)
        assert str(out) in said and "choose another --out" in said


def test_a_run_without_a_model_is_no_set_of_images(drawn: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """Killed before its first snapshot; or a folder of runs, in which pictures lie."""
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / "x.png").write_bytes((drawn / "000000.png").read_bytes())
    for words in (("evaluate", tmp_path, "--data", "digits"), ("sample", tmp_path), ("distill", tmp_path)):
        said = refused(*words)
        assert f"is a run that has made no model yet; go on with: imagewright train --resume {tmp_path}" in said
    (tmp_path / "experiment.json").unlink()
    assert "is no model; say with --data with which real images its pictures" in refused("evaluate", tmp_path)


def test_scores_say_of_which_weights_they_are(tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    words = ["evaluate", "emoji64-32", "--n", "4", "--steps", "1", "--metrics", "fd", "--no-yardsticks"]
    main([*words, "--out", str(out)])
    (entry,) = json.loads(out.read_text())["reports"]
    assert len(entry["weights_sha256"]) == 64 and entry["images_seen"] > 0
    assert entry["command"] == ["imagewright", *words, "--out", str(out)]
    record = json.loads(out.read_text())
    record["reports"][0]["weights_sha256"] = "other"
    out.write_text(json.dumps(record))
    main([*words, "--out", str(out)])
    assert len(json.loads(out.read_text())["reports"]) == 2
