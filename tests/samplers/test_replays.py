"""Replayed calls where no card is needed: contexts in each other, and recordings that fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.samplers import replay
from imagewright.samplers.replay import Replay, Replays


def network() -> SongUNet:
    return SongUNet(SongUNetConfig(img_resolution=4, in_channels=1, out_channels=1, model_channels=8,
                                   channel_mult=(1,), num_blocks=1, attn_resolutions=()))  # fmt: skip


def test_contexts_within_each_other_leave_nothing_behind() -> None:
    """A generator enters one of its own at each call; the outermost's recordings serve."""
    net = network()
    outer, inner = Replays(net), Replays(net)
    with outer:
        first = vars(net)["forward"]
        for context in (inner, outer):
            with context:
                assert vars(net)["forward"] is first
        assert vars(net)["forward"] is first
    assert "forward" not in vars(net)


def test_contexts_that_end_in_another_order_leave_nothing_behind() -> None:
    """As batches of two generators of one model, drawn by turns."""
    net = network()
    one, two = Replays(net), Replays(net)
    one.__enter__()
    two.__enter__()
    one.__exit__()
    two.__exit__()
    assert "forward" not in vars(net)


def test_a_recording_that_fails_is_tried_once_and_calls_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[None] = []

    def fails(*args: Any) -> None:
        tried.append(None)
        raise RuntimeError("no")

    monkeypatch.setattr(replay, "_Recorded", fails)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    called = Replay(lambda x, *rest: x.shape)
    x: Any = SimpleNamespace(is_cuda=True, shape=(1,), dtype=torch.float32, stride=lambda: (1,))
    with torch.no_grad():
        assert [called(x, x) for _ in range(4)] == [(1,)] * 4
    assert len(tried) == 1 and called.why_not == "no"
