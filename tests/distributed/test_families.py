"""Every family of methods on two processes (gloo): the losses of one process, and resumed with the same bits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imagewright.training.checkpoint import load_checkpoint
from imagewright.training.distributed import Processes
from imagewright.training.shares import rows_of

WORKER = Path(__file__).parent / "families.py"
NAMES = (
    "bits", "self-conditioned", "ict", "ecm", "vct", "multistep", "align", "ayf", "ctm", "uni", "dmd", "dmd2", "emd",
    "f-distill", "tsm", "smt", "smd", "dsno", "flow", "rfpp", "simple-reflow", "slimflow", "slimflow-distil",
    "caf-velocity", "caf", "caf-gan", "scd", "sct", "disco", "edm", "edm2", "cd", "ddo", "vq", "causal", "maskgit",
    "md4", "genmd4", "routing", "wrn", "pd", "arpg", "vatt", "metaclip2", "events",
)  # fmt: skip
MOVING = ("ctm", "caf-gan", "wrn")
"""Whose networks keep norms of batches, or spectral ones, from pass to pass, of which each process makes its own."""
SMALL = ("multistep",)
"""Whose loss is a small difference of two networks' answers."""
MAGNIFYING = ("vatt", "events")
"""Whose norms of a batch divide by the small deviation of vectors that begin nearly alike: the first step's loss is the
same to the bit, and its gradient, of norm 232, to 1e-7; the next step's to 1e-7 and 1e-6; of events' they may be 2e-4
apart."""
UNDIVIDED = ("wrn",)
"""Networks without blocks, which are whole in all processes."""


@pytest.fixture(scope="module")
def home(together: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    together(WORKER, str(folder))
    return folder


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads((home / "found.json").read_text())
    return measured


def test_every_family_was_trained(found: dict[str, Any]) -> None:
    assert tuple(found) == NAMES
    assert {way for each in found.values() for way in each} == {"replicate", "shard"}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_what_one_does_and_resume(name: str, found: dict[str, Any]) -> None:
    for way in ("replicate", "shard"):
        if way in found[name]:
            assert found[name][way]["resumed"], way
            loss, slope = (0.1, 0.3) if name in MOVING else (2e-5 if name in SMALL else 1e-6, 1e-5)
            if name in MAGNIFYING:
                loss, slope = 1e-3, 1e-2
            assert found[name][way]["loss"] < loss and found[name][way]["grad_norm"] < slope, way
            assert (found[name][way]["shares"] > 0) == (way == "shard" and name not in UNDIVIDED)


def test_four_processes_go_on_with_the_rows_of_two(
    home: Path, together: Callable[..., list[str]], tmp_path: Path
) -> None:
    shutil.copytree(home / "edm/shard/whole/checkpoints", tmp_path / "checkpoints")
    together(WORKER, str(home), "go-on", str(tmp_path), world=4)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == sorted(
        name
        for images in (20, 24)
        for name in (
            f"state-{images:012d}.safetensors",
            *(f"rows-{images:012d}-{k:04d}-of-0004.safetensors" for k in range(1, 5)),
        )
    )


def test_rows_of_two_processes_are_read_by_one(home: Path, tmp_path: Path) -> None:
    """What two have written together is, put together, what two have that hold all of it each."""
    shared = home / "edm/shard/whole/checkpoints/state-000000000016.safetensors"
    names = sorted(p.name for p in shared.parent.glob("*0016*"))
    assert names == [f"rows-000000000016-{k:04d}-of-0002.safetensors" for k in (1, 2)] + [shared.name]
    one = load_checkpoint(shared)
    alike = load_checkpoint(home / "edm/replicate/whole/checkpoints" / shared.name)
    assert_equal(one, alike, rtol=1e-5, atol=1e-6)

    spec = importlib.util.spec_from_file_location("families", WORKER)
    assert spec is not None and spec.loader is not None
    families: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(families)
    experiment = families.sized(dict(families.experiments(home))["edm"])
    (tmp_path / "checkpoints").mkdir()
    for path in shared.parent.glob("*0016*"):
        (tmp_path / "checkpoints" / path.name).write_bytes(path.read_bytes())
    alone = families.trainer(experiment, tmp_path, Processes())
    assert alone.resume() and alone.images == 16
    assert_equal(alone.state(), one, rtol=0, atol=0)

    lazy = load_checkpoint(shared, whole=False)["learners"]["denoiser"]["module"]
    for name, tensor in one["learners"]["denoiser"]["module"].items():
        if not isinstance(lazy[name], Tensor):
            pieces = [rows_of(lazy[name], rank, 4) for rank in range(4)]
            cut = torch.chunk(tensor, 4)
            assert [p.shape for p in pieces if len(p)] == [p.shape for p in cut]
            assert torch.equal(torch.cat(pieces), tensor)
    damaged = next(path for path in (tmp_path / "checkpoints").glob("rows-*-0002-*"))
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    with pytest.raises(Exception, match=r"0002-of-0002.* does not have the checksum"):
        families.trainer(experiment, tmp_path, Processes()).resume()


def assert_equal(a: Any, b: Any, rtol: float, atol: float) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_equal(value, b[key], rtol, atol)
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    else:
        assert a == b
