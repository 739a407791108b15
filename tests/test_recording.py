"""A recording that fails leaves the process as it was: with stand-ins for CUDA (`test_cuda.py` has the real one)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from imagewright.recording import Work, recorded


class Generator:
    """What torch's has of states that a recording may use."""

    def __init__(self, state: dict[str, bool]) -> None:
        self.state = state

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def clone_state(self) -> Generator:
        return Generator(dict(self.state))


class Stream:
    def __init__(self, device: int = 0) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...


class Card:
    """CUDA as PyTorch 2.11 leaves it where a recording breaks: stream, generator and pool stay as they are within."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.generator, self.open = Stream(), Generator({"recorded": False}), set()
        for name, value in {
            "current_device": lambda: 0, "current_stream": lambda device: self.stream, "Stream": Stream,
            "CUDAGraph": lambda: type("Graph", (), {"replay": lambda self: None})(), "stream": self.on,
            "graph_pool_handle": lambda: (0, 7), "default_generators": [self.generator], "graph": self.graph,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)

    @contextmanager
    def on(self, stream: Stream) -> Any:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, graph: Any, *, pool: tuple[int, int], stream: Stream, capture_error_mode: str) -> Any:
        before, self.stream = self.stream, stream
        self.generator.state["recorded"] = True
        self.open.add(pool)
        try:
            yield
        except Exception:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from None
        self.stream = before
        self.generator.state["recorded"] = False
        self.open.remove(pool)

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.open:
            raise RuntimeError("not currently recording to mempool_id")
        self.open.remove(pool)


META = torch.device("meta")
THERE, HERE = torch.zeros(3, device="meta"), torch.ones(3)


@pytest.mark.parametrize(
    "work",
    [
        lambda: HERE.to(META, non_blocking=True),
        lambda: torch.tensor(1.0).to(META, non_blocking=True),
        lambda: THERE.copy_(HERE, non_blocking=True),
        lambda: THERE[torch.tensor([1, 2])],
    ],
)
def test_what_the_host_sends_is_not_recorded(work: Work) -> None:
    """Whatever lies at its address would be sent again; nothing waits, so nothing else shows it."""
    with pytest.raises(RuntimeError, match="numbers travel between the host and the device"):
        recorded(work, META)


def test_one_number_of_the_host_is_recorded_itself() -> None:
    assert recorded(lambda: THERE.add_(1).mul_(torch.tensor(2.0)), META)


@pytest.mark.parametrize("fails_at", [None, 1, 2, 3])
def test_stream_generator_and_pool_are_as_before(fails_at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """fails_at: the watched pass, the warming up, the recording."""
    card, calls = Card(monkeypatch), []
    stream, state = card.stream, card.generator.state

    def work() -> None:
        calls.append(None)
        assert card.stream is not stream
        if len(calls) == fails_at:
            raise RuntimeError("what went wrong first\nand more")

    if fails_at is None:
        recorded(work, torch.device("cuda"))
    else:
        with pytest.raises(RuntimeError, match=r"^what went wrong first$"):
            recorded(work, torch.device("cuda"))
    assert card.stream is stream and not card.open
    assert card.generator.state is state and state == {"recorded": False}
