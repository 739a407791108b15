"""Between host and device nobody goes on too early; stand-ins show it without a device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import imagewright
from imagewright import fused
from imagewright.data.pixels import to_uint8
from imagewright.moving import fetched, sent
from imagewright.training.distributed import pick_device

ROOT = Path(imagewright.__file__).parent


@pytest.mark.parametrize(
    ("start", "end", "goes_on"),
    [("cpu", "cuda", True), ("cuda", "cpu", False), ("cuda:0", "cuda:1", False), ("cpu", "mps", False),
     ("mps", "cpu", False), ("cpu", "cpu", False)],
)  # fmt: skip
def test_only_towards_a_gpu_nobody_waits(start: str, end: str, goes_on: bool) -> None:
    asked: list[Any] = []
    tensor: Any = SimpleNamespace(
        device=torch.device(start), to=lambda device, non_blocking: asked.append((device, non_blocking))
    )
    sent(tensor, end)
    assert asked == [(torch.device(end), goes_on)]


def test_it_is_decided_in_one_place() -> None:
    found = {str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if "non_blocking" in p.read_text(encoding="utf-8")}
    assert found == {"moving.py"}


def test_what_comes_back_is_waited_for_on_the_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not the current device's, of the second of two GPUs."""
    done: list[str] = []

    class Event:
        def record(self, stream: str) -> None:
            done.append(f"recorded on {stream}")

        def synchronize(self) -> None:
            done.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    tensor: Any = SimpleNamespace(device=torch.device("cuda:1"), to=lambda *to, **how: done.append("sent") or "here")
    wait = fetched(tensor, tensor)
    assert done == ["sent", "sent", "recorded on the stream of cuda:1"]
    assert wait() == ["here", "here"] and done[-1] == "waited"


def test_bytes_of_the_cpu_are_fetched_as_they_are() -> None:
    assert to_uint8(torch.zeros(1, 1, 1, 1)).tolist() == [[[[128]]]]


def test_kernels_are_launched_on_the_device_of_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks for the current one."""
    inside: list[Any] = []

    class Current:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __enter__(self) -> None:
            inside.append(self.tensor)

        def __exit__(self, *error: object) -> None:
            inside.clear()

    h = torch.ones(2, 4, 2, 2)
    monkeypatch.setattr(torch.cuda, "device_of", Current)
    monkeypatch.setattr(fused, "_Dropped", SimpleNamespace(apply=lambda *given: list(inside)))
    monkeypatch.setattr(fused, "_Activated", SimpleNamespace(apply=lambda *given: [*inside, *given[3:5]]))
    assert fused.dropped(h, 0.5, 1, range(2))[0] is h
    one = torch.ones(1, 4, 1, 1)
    there, scale, shift = fused.activated(h, 2, None, None, 1e-5, one, one, silu=True)
    assert there is h and scale.shape == shift.shape == (2, 4, 1, 1), "a row for every image"


def test_the_device_that_is_picked_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    picked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", picked.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda") == torch.device("cuda:1") and picked == [torch.device("cuda:1")]
    pick_device("cpu")
    assert len(picked) == 1
