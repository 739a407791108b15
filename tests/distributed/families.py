"""What each of two processes runs (torchrun starts them): every family of methods, alone, replicated and sharded.

Of each family a run is trained whole, and again with a death and a new start; families are replicated and sharded in
turn, or with the word "both" each both ways. What came of it goes to a file that `test_families.py` reads; one start of
two interpreters for all.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import test_resume_of_methods as resumes

from imagewright.cli.main import main as imagewright
from imagewright.data import Loader
from imagewright.leaving import run_and_leave
from imagewright.networks import EDM2UNetConfig, VQAutoencoderConfig, WideResNetConfig
from imagewright.recipes import RECIPES
from imagewright.training import parallel
from imagewright.training.checkpoint import checkpoints, load_checkpoint
from imagewright.training.config import Parallel
from imagewright.training.distributed import Processes, processes
from imagewright.training.experiment import Experiment, assemble, run_experiment
from imagewright.training.log import Log
from imagewright.training.self_play import DrawNegatives
from imagewright.training.trainer import Trainer

SIZES: dict[str, Any] = {
    "total_images": 16, "batch": 4, "micro_batch": 2, "log_images": 4, "snapshot_images": 1e9, "checkpoint_images": 4,
    "trackers": (),
}  # fmt: skip
VQ = VQAutoencoderConfig(img_resolution=8, in_channels=1, model_channels=4, channel_mult=(1, 1), num_blocks=1,
                         codebook_size=7, codebook_dim=4)  # fmt: skip
EDM2 = EDM2UNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                      num_blocks=1, attn_resolutions=(8,), channels_per_head=8, dropout=0.1)  # fmt: skip


class Died(Exception):  # noqa: N818, a power cut, not an error
    pass


def made(folder: Path) -> None:
    """What students learn from."""
    training = replace(resumes.TRAINING, trackers=())
    teacher = replace(resumes.BASE, network=resumes.NETWORK, training=replace(training, total_images=16))
    run_experiment(teacher, folder / "teacher")
    times = map(str, resumes.METHODS["dsno"][0].path_times)
    words = ["--n", "40", "--sampler", "heun", "--steps", "2", "--shard", "16", "--times", *times]
    imagewright(["couple", str(folder / "teacher"), "--out", str(folder / "pairs"), *words])
    data = replace(resumes.BASE.data, couplings=str(folder / "pairs"))
    velocity = Experiment(data=data, method=resumes.METHODS["caf-velocity"][0], network=resumes.NETWORK,
                          training=replace(training, total_images=16))  # fmt: skip
    run_experiment(velocity, folder / "velocity")
    DrawNegatives(given={"model": str(folder / "teacher")}, n=12)(folder / "drawn", {}, "cpu")


def experiments(folder: Path) -> Iterator[tuple[str, Experiment]]:
    """A tiny run of every family."""
    teacher = str(folder / "teacher")
    for name, (method, sampler) in resumes.METHODS.items():
        fresh = "Training" in type(method).__name__ or name in resumes.FRESH
        given = {} if fresh else {"flow" if name == "slimflow-distil" else "teacher": teacher}
        if name in ("caf", "caf-gan"):
            given = {"velocity": str(folder / "velocity")}
        data = replace(resumes.BASE.data, couplings=resumes.pairs(name, folder / "pairs"))
        yield name, Experiment(
            data=data, method=method, network=resumes.NETWORK if fresh or name == "tsm" else None, given=given,
            sampler=sampler, training=resumes.BASE.training,
        )  # fmt: skip
    yield "edm", replace(resumes.BASE, network=resumes.NETWORK)
    yield "edm2", replace(resumes.BASE, network=EDM2)
    yield "cd", RECIPES["cd-digits"]().giving(teacher=teacher)
    yield "ddo", RECIPES["ddo-digits"]().giving(reference=teacher, negatives=str(folder / "drawn"))
    yield "vq", replace(RECIPES["vq-digits"](), network=VQ)
    for name in ("causal", "maskgit", "md4", "genmd4"):
        run = RECIPES[f"{name}-digits"]()
        small = {"width": 16, "depth": 2, "heads": 2} if hasattr(run.network, "width") else {"model_channels": 8}
        yield name, replace(run, network=replace(run.network, **small)).giving(tokenizer=None)
    routing = RECIPES["routing-digits"]()
    yield "routing", replace(routing, network=replace(routing.network, width=16, depth=1, heads=2, routing_heads=1))
    wide = RECIPES["wrn-digits"]()
    assert isinstance(wide.network, WideResNetConfig)
    yield "wrn", replace(wide, network=replace(wide.network, blocks=1, widen=1))
    steps = RECIPES["pd-digits"]()
    yield "pd", replace(steps, method=replace(steps.method, start_steps=2)).giving(teacher=teacher)
    arpg = RECIPES["arpg-digits"]()
    yield "arpg", replace(arpg, network=replace(arpg.network, width=16, depth=2, heads=2))
    vatt, size = RECIPES["vatt-standin-digits"](), (16, 1, 2)
    yield "vatt", replace(vatt, network=replace(vatt.network, video=size, audio=size, text=size))
    clip = RECIPES["metaclip2-digits"]()
    small = {"width": 16, "depth": 1, "text_width": 12, "text_depth": 1, "text_heads": 2}
    yield "metaclip2", replace(clip, network=replace(clip.network, **small), data=replace(clip.data, pairs=100))
    events = RECIPES["events-digits"]()
    tiny = replace(events.network, width=16, depth=1, heads=2)
    yield "events", replace(events, network=tiny, method=replace(events.method, hidden=16, out=8))


def sized(experiment: Experiment) -> Experiment:
    """The run in few steps that move its weights; Adam's eps is large, so that it magnifies no rounding."""
    optimizer = replace(
        experiment.training.optimizer, eps=1e-3, lr=3e-3, lr_ramp_images=0, lr_cooldown_images=0, lr_decay_images=None,
        clip_norm=1.0,
    )  # fmt: skip
    return replace(experiment, training=replace(experiment.training, **SIZES, optimizer=optimizer)).in_images()


def trainer(experiment: Experiment, folder: Path, group: Processes, **options: Any) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    found = assemble(experiment)
    training = experiment.training
    loader = Loader(found.images, training.batch, training.seed, False, found.couplings, 0)
    return Trainer(experiment.method, found.parts, loader, training, folder / "checkpoints",
                   log=Log(folder if group.is_first else None), processes=group, **options)  # fmt: skip


def numbers(folder: Path) -> list[dict[str, float]]:
    """What the log has over all processes: of each step and part the loss and the gradient's norm."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.endswith(("/loss", "/grad_norm"))} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "checkpoints").glob("*0016*.safetensors"))}


def resumed(experiment: Experiment, folder: Path, group: Processes) -> bool:
    """Whether a run with a death in it ends with the bits of a whole one."""

    def die(progress: Any) -> None:
        if progress.images == 12:
            raise Died

    with suppress(Died):
        trainer(experiment, folder / "died", group, on_progress=die).train()
    again = trainer(experiment, folder / "died", group)
    assert again.resume() and again.images == 8
    again.train()
    return not group.is_first or files(folder / "died") == files(folder / "whole")


def measure(
    name: str, experiment: Experiment, folder: Path, group: Processes, ways: tuple[Parallel, ...]
) -> dict[str, Any]:
    """What came of one family on both processes."""
    found: dict[str, Any] = {}
    for way in ways:
        run = replace(experiment, training=replace(experiment.training, parallel=way))
        whole = trainer(run, folder / way / "whole", group)
        whole.train()
        shares = sum(len(held.local) for held in whole.held.values())
        found[way] = {"resumed": resumed(run, folder / way, group), "shares": shares}
    if group.is_first:
        one = numbers(folder / "one")
        for way in ways:
            both = numbers(folder / way / "whole")
            assert len(one) == len(both) == 4 and [a.keys() for a in one] == [b.keys() for b in both]
            for name in ("loss", "grad_norm"):
                pairs = [(a[k], b[k]) for a, b in zip(one, both, strict=True) for k in a if k.endswith(name)]
                found[way][name] = max(abs(x - y) / max(abs(x), 1e-2) for x, y in pairs)
    return found


def main(folder: Path, names: list[str]) -> None:
    """names: of families; none of them = all."""
    parallel.BUCKET = 4096  # several of them
    alone = os.environ["RANK"] == "0"
    if alone:
        made(folder)
        (folder / "made").touch()
    while not (folder / "made").exists():
        time.sleep(0.1)
    chosen = {n: sized(e) for n, e in experiments(folder) if n in names or not {*names} - {"both"}}
    if alone:  # before there is a group: some methods add up over all that there are
        for name, experiment in chosen.items():
            # f-distill divides by a mean over the forward passes of all processes; VATT, Meta CLIP and events compare
            # all that is in them: one process makes them in one.
            micro = SIZES["batch" if name in ("f-distill", "vatt", "metaclip2", "events") else "micro_batch"]
            run = replace(experiment, training=replace(experiment.training, micro_batch=micro))
            trainer(run, folder / name / "one", Processes()).train()
    with processes() as group:
        found: dict[str, Any] = {}
        for number, (name, experiment) in enumerate(chosen.items()):
            ways: tuple[Parallel, ...] = ("replicate", "shard")
            if "both" not in names and name != "edm":
                ways = ways[number % 2 :][:1]
            found[name] = measure(name, experiment, folder / name, group, ways)
            if group.is_first:
                (folder / "found.json").write_text(json.dumps(found))
                print(name, found[name], flush=True)


def go_on(folder: Path, begun: Path) -> None:
    """Resume the sharded run of edm that lies in `begun`, on however many processes there are."""
    experiment = sized(dict(experiments(folder))["edm"])
    training = replace(experiment.training, micro_batch=1, parallel="shard", total_images=24)
    with processes() as group:
        found = trainer(replace(experiment, training=training), begun, group)
        assert found.resume() and found.images == 16
        state = found.product_state()
        if group.is_first:
            there = load_checkpoint(checkpoints(begun / "checkpoints")[-1])
            wanted = there["learners"]["denoiser"]["averages"]["halflife"]
            assert state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)
        found.train()


def run() -> None:
    torch.set_num_threads(1)
    if sys.argv[2:3] == ["go-on"]:
        go_on(Path(sys.argv[1]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    run_and_leave(run)
