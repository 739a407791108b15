"""Steps that are recorded: which methods permit it, and that they are the plain ones.

Here a recording is the work itself, done again; `tests/test_cuda.py` records real graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from imagewright.data import Loader
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.graphs import Graphs, kept
from imagewright.training.log import Log, read_log
from imagewright.training.trainer import Trainer
from imagewright.types import Batch, Clock, Event, Follow, Parts, Trained, Update

NETWORK = SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1, 2),
                         num_blocks=1, attn_resolutions=(4,), dropout=0.2)  # fmt: skip


def short(name: str) -> Experiment:
    run = RECIPES[name]()
    training = replace(run.training, batch=4, micro_batch=None, total_images=4 * 6, log_images=8)
    return replace(run, network=NETWORK, training=training)


def trainer(experiment: Experiment, folder: Path, graphs: bool) -> Trainer:
    torch.manual_seed(0)
    made, training = assemble(experiment), experiment.training
    folder.mkdir()
    loader = Loader(made.images, training.batch, training.seed)
    t = Trainer(experiment.method, made.parts, loader, training, folder / "checkpoints", log=Log(folder))
    if graphs:
        t.graphs = recording(t)
    return t


def recording(t: Trainer) -> Graphs:
    return Graphs(t.method, t.parts, t.learners, t.config.precision, t.config.batch, range(t.config.batch), t.device)


@pytest.mark.parametrize("name", ["edm-digits", "trigflow-digits"])
def test_a_recorded_run_is_the_plain_one(name: str, tmp_path: Path) -> None:
    """To the bit: weights, averages, the log by noise level; dropout and class dropout included."""
    plain, other = (trainer(short(name), tmp_path / str(graphs), graphs) for graphs in (False, True))
    for t in (plain, other):
        t.train()
    assert other.graphs is not None and other.graphs.ready, other.graphs and other.graphs.why_not
    for a, b in zip(plain.product_state().values(), other.product_state().values(), strict=True):
        assert torch.equal(a, b)
    logs = [read_log(tmp_path / str(graphs) / "log.jsonl") for graphs in (False, True)]
    dropped = [[{k: v for k, v in line.items() if k != "images_per_second"} for line in log] for log in logs]
    assert dropped[0] == dropped[1]


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))


@dataclass
class Odd:
    """A method with one trait."""

    trait: str
    product: ClassVar[str] = "part"

    def step(self, parts: Any, batch: Batch, noise: Any, clock: Clock) -> Iterator[Event]:
        pixels = batch.images.flatten(1).mean(1)
        if self.trait == "places":
            yield Update("part", (parts.part.w - pixels * torch.arange(len(pixels))).square())
            return
        pixels = pixels + noise.normal(batch.images[:, 0, 0, 0])
        if self.trait == "notes":
            parts.part.seen += pixels.detach().mean()
        if self.trait == "clock":
            pixels = pixels * clock.fraction
        if self.trait == "torch":
            pixels = pixels + torch.rand(())
        if self.trait == "common":
            pixels = pixels + noise.common(torch.empty(()))
        loss = (parts.part.w - pixels).square()
        yield Update("part", loss, {"pixels": pixels})
        if self.trait == "twice":
            yield Update("part", (parts.part.w - pixels).square())
        if self.trait == "late":
            pixels.sum()
        yield Follow("part", "part", 0.5)


@pytest.mark.parametrize(
    ("trait", "why_not"),
    [
        ("none", None),
        ("notes", None),
        ("clock", "its step asks where the run stands"),
        ("torch", "its step draws from torch's generator"),
        ("common", "its step draws on the host"),
        ("twice", "its step yields Update, Update"),
        ("late", "its step computes after its update"),
    ],
)
def test_what_a_recording_could_not_repeat_is_not_recorded(trait: str, why_not: str | None, tmp_path: Path) -> None:
    runs = []
    for graphs in (False, True):
        made = assemble(short("edm-digits"))
        torch.manual_seed(0)
        parts = Parts(part=Trained(module=Weight()))
        t = Trainer(Odd(trait), parts, Loader(made.images, 4, 0), short("edm-digits").training, tmp_path)
        t.graphs = recording(t) if graphs else None
        for _ in range(5):
            t.train_step()
        runs.append(t)
    assert runs[1].graphs.why_not == why_not
    assert runs[0].watch.losses == runs[1].watch.losses
    for one, other in zip(*(t.learners["part"].module.state_dict().values() for t in runs), strict=True):
        assert torch.equal(one, other)


def test_a_recording_that_keeps_its_own_batch_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where numbers of the batch were recorded, and not where they are read from."""
    monkeypatch.setattr("imagewright.training.graphs.recorded", lambda work, device: work() or (lambda: None))
    made = assemble(short("edm-digits"))
    parts = Parts(part=Trained(module=Weight()))
    t = Trainer(Odd("places"), parts, Loader(made.images, 4, 0), short("edm-digits").training, tmp_path)
    t.graphs = recording(t)
    for _ in range(2):
        t.train_step()
    with pytest.warns(UserWarning, match=r"repeated, its loss is .* where a plain step's is"):
        t.train_step()


@pytest.mark.parametrize(("changes", "why"), [({}, "the device is cpu"), ({"graphs": False}, None)])
def test_one_who_asks_in_vain_is_told(changes: Any, why: str | None, tmp_path: Path) -> None:
    run = short("edm-digits")
    run = replace(run, training=replace(run.training, **{"graphs": True} | changes))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(run, tmp_path / "run", graphs=False)
    said = [str(w.message) for w in told if "training.graphs" in str(w.message)]
    assert len(said) == (why is not None) and all(str(why) in words for words in said)


def test_a_recording_that_fails_leaves_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: Any, device: torch.device) -> Any:
        work()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr("imagewright.training.graphs.recorded", fails)
    plain, other = (trainer(short("edm-digits"), tmp_path / str(graphs), graphs) for graphs in (False, True))
    plain.train()
    with pytest.warns(UserWarning, match="it cannot be recorded: CUDA error"):
        other.train()
    assert other.graphs is not None
    assert other.graphs.why_not == "it cannot be recorded: CUDA error: operation not permitted when stream is capturing"
    for a, b in zip(plain.product_state().values(), other.product_state().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_repetition_that_computes_something_else_is_given_up(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = (trainer(short("edm-digits"), tmp_path / str(graphs), graphs) for graphs in (False, True))

    def recorded(work: Any, device: torch.device) -> Any:
        def repeated() -> None:
            work()
            assert other.graphs is not None
            if wrong == "loss":
                other.graphs._update.loss.mul_(1.1)
            else:
                other.graphs._gradients[-1].add_(1)

        work()
        return repeated

    monkeypatch.setattr("imagewright.training.graphs.recorded", recorded)
    plain.train()
    with pytest.warns(UserWarning, match=r"repeated, its loss is .* where a plain step's is"):
        other.train()
    for a, b in zip(plain.product_state().values(), other.product_state().values(), strict=True):
        assert torch.equal(a, b)


def test_what_keeps_a_pass_is_seen() -> None:
    """A parameter's node of it would tie a recording to the stream of that pass."""
    layer = nn.Linear(2, 1)
    loss = layer(torch.ones(1, 2)).sum()
    loss.backward()
    assert kept(list(layer.parameters()))
    del loss
    assert not kept(list(layer.parameters()))


def test_a_run_that_keeps_a_pass_is_not_recorded(tmp_path: Path) -> None:
    t = trainer(short("edm-digits"), tmp_path / "run", graphs=True)
    loss = next(iter(t.learners["denoiser"].parameters)).sum()
    t.train()
    assert t.graphs is not None and t.graphs.why_not is not None and "keeps the graph" in t.graphs.why_not
    assert loss.requires_grad
