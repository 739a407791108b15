"""MD4 and GenMD4 end to end: train, sample, evaluate, edit, report, with no flag for the kind of model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from imagewright.cli.main import main

SMALL = [
    "--network.model-channels", "8", "--network.num-blocks", "1", "--training.total-images", "64",
    "--training.batch", "16", "--training.log-images", "16", "--sampler.num-steps", "5", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize("recipe", ["md4-digits", "genmd4-digits"])
def test_a_run_needs_no_flag(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    main(["train", recipe, "--out", run, *SMALL])
    kept = json.loads((tmp_path / "run" / "model.json").read_text())
    assert kept["kind"] == "token_model" and kept["sampler"] == {"class": "ancestral", "num_steps": 5, "grid": "cosine"}
    capsys.readouterr()

    main(["sample", run, "--n", "3", "--label", "7", "--out", str(tmp_path / "a"), "--npz", "--trajectory"])
    assert "5 network calls each" in capsys.readouterr().out
    main(["sample", run, "--n", "3", "--label", "7", "--out", str(tmp_path / "b"), "--npz", "--batch-size", "2"])
    one, two = (np.load(tmp_path / d / "samples.npz", allow_pickle=False)["images"] for d in "ab")
    assert np.array_equal(one, two)

    main(["evaluate", run, "--metrics", "bpd", "--n", "20", "--passes", "2"])
    (entry,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["likelihoods"]
    assert entry["report"]["kind"] == "bound" and entry["report"]["stderr"] > 0
    assert 5 < entry["report"]["bpd"] < 11

    main(
        [
            "edit",
            run,
            "--task",
            "inpaint",
            "--index",
            "3",
            "--mask",
            "top",
            "--steps",
            "3",
            "--out",
            str(tmp_path / "e"),
        ]
    )
    assert (tmp_path / "e" / "inpaint.png").exists()
    main(["report", run])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "bits/dim" in page and "bound" in page
