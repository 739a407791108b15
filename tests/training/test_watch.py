"""Runs that are looked at only now and then, as on a GPU: the same numbers, and nothing moves after a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from imagewright.data import Loader, open_images
from imagewright.training.config import EmaConfig, OptimizerConfig, OptimizerKind, TrainingConfig
from imagewright.training.log import Log
from imagewright.training.trainer import Trainer
from imagewright.training.watch import Watch
from imagewright.types import Batch, Clock, Event, Parts, Trained, Update, UserError

CONFIG = TrainingConfig(
    total_images=64, batch=8, optimizer=OptimizerConfig(lr=0.1), ema=EmaConfig(halflife_images=8), log_images=1000,
    snapshot_images=1000, checkpoint_images=24,
)  # fmt: skip


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


@dataclass
class Pull:
    """Two parts, each drawn to the mean pixel; `spoil` is done to the loss of either."""

    product: ClassVar[str] = "one"
    spoil: Callable[[Tensor, str, Clock], Tensor] = lambda loss, part, clock: loss

    def step(self, parts: Any, batch: Batch, noise: Any, clock: Clock) -> Iterator[Event]:
        pixels = batch.images.flatten(1).mean(1)
        for part in ("one", "two"):
            loss = (getattr(parts, part).w.sum() - pixels).square()
            yield Update(part, self.spoil(loss, part, clock), {"pixels": pixels}, at=pixels.abs())


def trainer(folder: Path, *, patient: bool, method: Any = None, **changes: Any) -> Trainer:
    config = replace(CONFIG, **changes)
    parts = Parts(one=Trained(module=Weight()), two=Trained(module=Weight()))
    folder.mkdir(exist_ok=True)
    loader = Loader(open_images("digits"), config.batch, config.seed)
    t = Trainer(method or Pull(), parts, loader, config, folder / "checkpoints", log=Log(folder))
    t.watch = Watch(t.device, patient=patient)
    return t


def spoiled(at: int, how: Callable[[Tensor], Tensor]) -> Pull:
    return Pull(spoil=lambda loss, part, clock: how(loss) if part == "two" and clock.step == at else loss)


def infinite_slope(loss: Tensor) -> Tensor:
    return loss + (loss * 0).sqrt()


@pytest.mark.parametrize("kind", ["adam", "adamw", "radam"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_patience_changes_no_bit(tmp_path: Path, kind: OptimizerKind, precision: Any) -> None:
    ends = []
    for patient in (True, False):
        folder = tmp_path / str(patient)
        optimizer = OptimizerConfig(lr=0.1, kind=kind, clip_norm=0.5)
        t = trainer(folder, patient=patient, optimizer=optimizer, precision=precision, log_images=16)
        t.train()
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert "two/grad_norm" in lines[0] and "one/pixels" in lines[0]
        ends.append(
            ([{k: v for k, v in line.items() if k != "images_per_second"} for line in lines], t.product_state())
        )
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1]["w"], ends[1][1]["w"])


@pytest.mark.parametrize(
    ("how", "what"), [(lambda loss: loss / 0, "loss inf"), (infinite_slope, "gradient")], ids=["loss", "gradient"]
)
@pytest.mark.parametrize("kind", ["adam", "adamw", "radam"])
def test_no_weight_moves_after_a_bad_number(tmp_path: Path, kind: OptimizerKind, how: Any, what: str) -> None:
    """Found out where a checkpoint is due, two steps later, which is not written; the step named is the bad one."""
    optimizer = OptimizerConfig(lr=0.1, kind=kind, weight_decay=0.1)
    good = trainer(tmp_path / "good", patient=False, optimizer=optimizer, total_images=8)
    good.train()
    bad = trainer(tmp_path / "bad", patient=True, method=spoiled(1, how), optimizer=optimizer)
    with pytest.raises(UserError, match=rf"step 1 \(8 images\): the {what} of part 'two'.* not finite; .* none yet"):
        bad.train()
    assert torch.equal(bad.parts.two.w, good.parts.two.w)
    assert torch.isfinite(bad.parts.one.w).all()
    assert bad.step_index == (1 if kind == "radam" else 3)  # radam's kernel minds no flag, so it is looked at


def test_with_a_loss_scale_too(tmp_path: Path) -> None:
    bad = trainer(tmp_path, patient=True, method=spoiled(1, lambda loss: loss * float("nan")), precision="fp16")
    first = trainer(tmp_path / "first", patient=True, precision="fp16", total_images=8)
    first.train()
    with pytest.raises(UserError, match=r"step 1 \(8 images\): the loss nan of part 'two'"):
        bad.train()
    assert bad.step_index == 3 and torch.equal(bad.parts.two.w, first.parts.two.w)


def test_it_looks_after_so_many_updates_in_any_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("imagewright.training.watch.MOST", 4)
    bad = trainer(tmp_path, patient=True, method=spoiled(0, infinite_slope), checkpoint_images=1000)
    with pytest.raises(UserError, match="step 0"):
        bad.train()
    assert bad.step_index == 1
