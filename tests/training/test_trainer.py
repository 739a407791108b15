"""The loop: one optimiser step per yielded update, accumulation, stops, checkpoints."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imagewright.data import Loader, open_images
from imagewright.training import checkpoint
from imagewright.training.checkpoint import checkpoints, load_checkpoint
from imagewright.training.config import EmaConfig, OptimizerConfig, TrainingConfig
from imagewright.training.distributed import Processes
from imagewright.training.trainer import Interrupted, Progress, Trainer
from imagewright.types import Batch, Clock, Event, Follow, Parts, Trained, Update, UserError

CONFIG = TrainingConfig(
    total_images=32, batch=8, optimizer=OptimizerConfig(lr=0.1), ema=EmaConfig(halflife_images=8), log_images=8,
    snapshot_images=16, checkpoint_images=8, keep_checkpoints=2,
)  # fmt: skip


class Weight(nn.Module):
    """One number."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))


@dataclass
class Toy:
    """A generator that learns once and a critic that learns twice a step; each runs to the mean pixel."""

    product: ClassVar[str] = "generator"
    critic_updates: int = 2
    spoil: Callable[[Tensor, Clock, Batch], Tensor] = lambda loss, clock, batch: loss

    def step(self, parts: Any, batch: Batch, noise: Any, clock: Clock) -> Iterator[Event]:
        pixels = batch.images.flatten(1).mean(1)
        loss = (parts.generator.w - pixels).square()
        yield Update("generator", self.spoil(loss, clock, batch))
        for _ in range(self.critic_updates):
            yield Update("critic", (parts.critic.w - pixels).square())


def trainer(folder: Path, method: Any = None, config: TrainingConfig = CONFIG, **options: Any) -> Trainer:
    parts = Parts(generator=Trained(module=Weight()), critic=Trained(module=Weight(), ema=False))
    loader = Loader(open_images("digits"), config.batch, config.seed)
    return Trainer(method or Toy(), parts, loader, config, folder, **options)


def steps_of(t: Trainer, part: str) -> int:
    optimizer = t.learners[part].optimizer
    return int(optimizer.state[t.learners[part].parameters[0]]["step"])


def test_one_optimiser_step_per_update(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.train()
    assert (steps_of(t, "generator"), steps_of(t, "critic"), t.step_index, t.images) == (4, 8, 4, 32)
    assert t.learners["generator"].averages and not t.learners["critic"].averages


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_accumulation_is_the_whole_batch(tmp_path: Path, micro: int) -> None:
    whole, parts = trainer(tmp_path / "whole"), trainer(tmp_path / "parts", config=replace(CONFIG, micro_batch=micro))
    whole.train(), parts.train()
    assert parts.parts.critic.w.item() == pytest.approx(whole.parts.critic.w.item(), rel=1e-5)
    assert steps_of(parts, "critic") == 8


def test_a_micro_batch_is_read_when_it_begins_and_every_picture_once(tmp_path: Path) -> None:
    digits, read = open_images("digits"), []

    def counted(rows: np.ndarray) -> np.ndarray:
        read.extend(rows.tolist())
        return digits.images(rows)

    loader, asked, begun = Loader(replace(digits, pixels=counted), 8, 0), [], []
    give = loader.batch
    loader.batch = lambda *of: asked.append(of) or give(*of)  # type: ignore[method-assign]

    class Noting(Toy):
        def step(self, parts: Any, batch: Batch, noise: Any, clock: Clock) -> Iterator[Event]:
            begun.append(len(asked))
            yield from super().step(parts, batch, noise, clock)

    parts = Parts(generator=Trained(module=Weight()), critic=Trained(module=Weight(), ema=False))
    Trainer(Noting(), parts, loader, replace(CONFIG, micro_batch=2), tmp_path).train()
    assert begun == list(range(1, 17))  # the first of four was computed when the second was asked for
    assert len(read) == 32 and asked == [(2 * i, 2) for i in range(16)]


def test_micro_batches_must_yield_alike(tmp_path: Path) -> None:
    @dataclass
    class Uneven(Toy):
        def step(self, parts: Any, batch: Batch, noise: Any, clock: Clock) -> Iterator[Event]:
            self.critic_updates += 1
            part = "generator" if self.critic_updates % 2 else "critic"
            yield Update(part, (getattr(parts, part).w - batch.images.flatten(1).mean(1)).square())

    with pytest.raises(ValueError, match="micro-batches of one step yielded different events"):
        trainer(tmp_path, Uneven(), replace(CONFIG, micro_batch=4)).train()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    method = Toy(spoil=lambda loss, clock, batch: loss / 0 if clock.step == 2 else loss)
    t = trainer(tmp_path, method)
    with pytest.raises(UserError, match=r"step 2 \(16 images\): the loss inf of part 'generator'.*00016\.safetensors"):
        t.train()
    assert torch.isfinite(t.parts.generator.w)


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    def spoil(loss: Tensor, clock: Clock, batch: Batch) -> Tensor:
        return loss + (loss * 0).sqrt()  # finite, with an infinite slope at 0

    t = trainer(tmp_path, Toy(spoil=spoil))
    with pytest.raises(UserError, match=r"the gradient of part 'generator' is not finite; .* none yet"):
        t.train()
    assert t.parts.generator.w.item() == 0


def test_clipping_limits_the_gradient(tmp_path: Path) -> None:
    config = replace(CONFIG, total_images=8, optimizer=OptimizerConfig(lr=0.1, clip_norm=1e-12, eps=1.0))
    t = trainer(tmp_path, config=config)
    t.train()
    assert 0 < abs(t.parts.generator.w.item()) <= 1e-12


def test_ctrl_c_saves_after_the_step_and_the_run_goes_on(tmp_path: Path) -> None:
    def press(progress: Progress) -> None:
        if progress.images == 16:
            signal.raise_signal(signal.SIGINT)

    config = replace(CONFIG, checkpoint_images=1000)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        trainer(tmp_path / "a", config=config, on_progress=press).train()
    assert stopped.value.checkpoint == tmp_path / "a" / "state-000000000016.safetensors"
    assert signal.getsignal(signal.SIGINT) is before
    whole, again = trainer(tmp_path / "b", config=config), trainer(tmp_path / "a", config=config)
    assert again.resume() and again.images == 16
    again.train(), whole.train()
    assert torch.equal(again.parts.generator.w, whole.parts.generator.w)


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    assert [p.name for p in checkpoints(tmp_path)] == [
        "state-000000000024.safetensors",
        "state-000000000032.safetensors",
    ]


class Later(Processes):
    """One of several processes whose first has found a checkpoint that is not the newest any more."""

    def from_first(self, number: float) -> float:
        assert number == 32
        return 24


def test_the_first_process_says_from_where_all_go_on(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    late = trainer(tmp_path, processes=Later())
    assert late.resume() and late.images == 24


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"00032\.safetensors is not a whole checkpoint .*remove it"):
        trainer(tmp_path).resume()
    newest.unlink()
    t = trainer(tmp_path)
    assert t.resume() and t.images == 24


def test_a_write_that_dies_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path)
    t.train()
    before = checkpoints(tmp_path)[-1].read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(before[:50])
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(UserError, match="disk full"):
        t.save()
    assert checkpoints(tmp_path)[-1].read_bytes() == before
    assert load_checkpoint(checkpoints(tmp_path)[-1])["images"] == 32


def test_the_run_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state of its moment."""
    passed, write = threading.Event(), checkpoint.save_file

    def slow(*args: Any, **options: Any) -> None:
        assert passed.wait(600), "the run waits for the disk"
        write(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    config, weights = replace(CONFIG, checkpoint_images=16), {}

    def step(progress: Progress) -> None:
        weights[progress.images] = t.parts.generator.w.item()
        if progress.images == 24:
            assert not checkpoints(tmp_path)
            passed.set()

    t = trainer(tmp_path, config=config, on_progress=step)
    t.train()
    first = load_checkpoint(checkpoints(tmp_path)[0])
    assert first["learners"]["generator"]["module"]["w"].item() == weights[16] != weights[24]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    t = trainer(tmp_path)
    with pytest.raises(UserError, match="disk full"):
        t.train()
    assert not list(tmp_path.glob("*")), "nothing half-written is left"


def test_follow_moves_the_target_once_a_step(tmp_path: Path) -> None:
    @dataclass
    class Following(Toy):
        def step(self, parts: Any, batch: Batch, noise: Any, clock: Clock) -> Iterator[Event]:
            yield from super().step(parts, batch, noise, clock)
            yield Follow("critic", "generator", 0.25)

    t = trainer(tmp_path, Following(critic_updates=0), replace(CONFIG, total_images=8, micro_batch=2))
    t.parts.critic.w.data.fill_(4.0)
    t.train()
    assert t.parts.critic.w.item() == pytest.approx(0.25 * 4 + 0.75 * t.parts.generator.w.item())


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    from imagewright.training.distributed import Processes

    with pytest.raises(UserError, match=r"training\.batch is 8; it must be a multiple"):
        trainer(tmp_path, processes=Processes(0, 3))
