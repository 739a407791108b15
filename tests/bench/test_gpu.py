"""The script for a GPU: every part at toy size on the CPU, and what it says where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from imagewright.bench.gpu import command
from imagewright.bench.gpu.__main__ import main
from imagewright.bench.gpu.command import PARTS
from imagewright.bench.gpu.timing import OutOfTime


def run(folder: Path, *words: str) -> dict:
    assert main(["--out", str(folder), "--toy", "--minutes", "600", *words]) in (0, 1)  # however slow the machine is
    return json.loads((folder / "gpu.json").read_text())


def test_rates_steps_and_sampling(tmp_path: Path) -> None:
    found = run(tmp_path, "--parts", "a,b,c")
    a, b, c = (found["parts"][name] for name in "abc")
    assert [p["status"] for p in (a, b, c)] == ["done"] * 3, [p.get("error") for p in (a, b, c)]
    assert all(a[name]["flops"] > 0 for name in ("bf16", "tf32", "fp32")) and a["copy"]["bytes"] > 0
    step = b["runs"]["trainer bf16 channels_last"]
    assert "error" not in step, step["error"]
    assert step["utilisation"] == pytest.approx(step["images_per_second"] * b["flops_per_image"] / a["bf16"]["flops"])
    assert {"1 calls", "3 calls, graphs", "1 calls, graphs"} <= c["small, 1"].keys()
    assert found["device"]["name"] == "cpu" and "--toy" in found["command"] and "torch" in found["versions"]


def test_updates_and_sharding(tmp_path: Path) -> None:
    d, e = (run(tmp_path, "--parts", "d,e")["parts"][name] for name in "de")
    assert [p["status"] for p in (d, e)] == ["done"] * 2, [p.get("error") for p in (d, e)]
    assert d["dmd2-imagenet64-gan"]["updates"] == {"fake_score": 5, "generator": 1}
    assert not [found["error"] for found in d.values() if isinstance(found, dict) and "error" in found]
    assert all(d[name]["seconds"] > 0 for name in ("scd-imagenet64", "ctm-imagenet64", "md4-imagenet64"))
    assert e["sharded, recomputed"]["parameters"] == e["whole"]["parameters"]


def test_emoji_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Called again, it trains nothing anew: models of the first call stand, and are scored."""
    first = run(tmp_path, "--parts", "f")["parts"]["f"]
    assert first["status"] == "done", first.get("error")
    assert first["scores"]["student, 1 steps"]["calls"] == 1 and (tmp_path / "student.png").exists()
    written = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    again = run(tmp_path, "--parts", "f")["parts"]["f"]
    assert "teacher" not in again and again["scores"].keys() == first["scores"].keys()
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == written


def test_a_part_that_fails_or_outlasts_its_time_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(own: dict, *rest: object) -> None:
        own["half"] = 1
        raise RuntimeError("no kernel")

    def late(own: dict, *rest: object) -> None:
        raise OutOfTime

    monkeypatch.setattr(command, "PARTS", {**PARTS, "a": (fails, 0.5), "b": (late, 0.5)})
    parts = run(tmp_path, "--parts", "a,b")["parts"]
    assert parts["a"]["status"] == "failed" and parts["a"]["half"] == 1 and "no kernel" in parts["a"]["error"]
    assert parts["b"]["status"] == "out of time"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "there is no CUDA device here; --toy runs every part at toy size on the CPU\n"
    assert not (tmp_path / "new").exists()
