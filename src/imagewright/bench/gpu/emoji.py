"""Part f: emoji at 64x64 trained for the minutes that are there: a denoiser, its one-step student, grids and scores.

A training's length is fixed when it begins, by its measured rate and the time left, and written to runs/plan.json: the
command called again, with the same folder, goes on where it stopped. OUT/teacher and OUT/student are the models in half
precision; a teacher that lies there, without its run, is taken as it is.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imagewright.bench.gpu.scale import Scale, shrunk
from imagewright.bench.gpu.timing import Deadline, Numbers, OutOfTime
from imagewright.data import ImageSet, open_images
from imagewright.files import parse_json, write_json
from imagewright.metrics.draws import draw_for_score
from imagewright.metrics.evaluate import evaluate
from imagewright.metrics.features import emoji_features
from imagewright.metrics.memorisation import nearest
from imagewright.metrics.reference import Reference, embed
from imagewright.models.files import save_model
from imagewright.precision import Precision
from imagewright.pretrained import find_model, load
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.experiment import Experiment, run_experiment
from imagewright.training.snapshots import save_grid
from imagewright.training.trainer import Interrupted, Progress
from imagewright.types import Sampler

STAGES = {"teacher": ("edm-emoji64-64", 0.68), "student": ("cd-emoji64-64", 0.8)}
"""Recipe of each, and its share of the time that is left when it begins."""
SCORING = 50.0
"""Seconds kept for grids and scores."""
SCORED = 946
"""Images of a score: as many as the shipped model's card has."""
STEPS = {"teacher": (1, 2, 4, 8, 18), "student": (1, 2)}
SECOND = 0.8
"""Noise level of the student's second step."""
WARM = 15
"""Steps before a rate is believed; three times as many are timed."""
TRIAL = 45.0
"""Seconds at most in which another process finds out whether steps can be recorded, and how fast they are then."""
SLOW = 3000.0
"""Images a second below which the host is what is waited for, and a batch four times as large costs no more."""
SHIPPED = ("emoji64-32", 12)
"""The model to beat, and the steps of its card. It draws 32x32: what is held against it is halved, by means of 2x2."""


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """Both trainings as far as the time goes, then grids and scores of what is finished."""
    scores: Numbers = {}
    own["scores"] = scores
    with _fast(device):
        for stage, (recipe, share) in STAGES.items():
            if not (folder / stage / "model.json").exists():
                seconds = share * (deadline.left - (SCORING if not scale.toy else 0))
                own[stage] = _train(stage, recipe, seconds, scale, device, folder)
        reference = _reference(scale)
        for stage in STAGES:
            for steps in STEPS[stage][: 1 if scale.toy else None]:
                deadline.check()
                generator = _generator(folder / stage, steps, device)
                scores[f"{stage}, {steps} steps"] = _score(generator, reference, scale, yardsticks=not scores)
            picture = 1 if scale.toy or stage == "student" else max(STEPS[stage])
            save_grid(folder / f"{stage}.png", _generator(folder / stage, picture, device))
        own["copies"] = _copies(folder / "student", scale, device)
        if not scale.toy:
            name, steps = SHIPPED
            small = _reference(scale, 32)
            scores[f"shipped {name}, {steps} steps"] = _score(load(name, Heun(num_steps=steps), device), small, scale)
            for stage in STAGES:
                generator = _generator(folder / stage, steps if stage == "teacher" else 1, device)
                scores[f"{stage} halved, {generator.nfe} calls"] = _score(generator, small, scale)


def _train(stage: str, recipe: str, seconds: float, scale: Scale, device: torch.device, folder: Path) -> Numbers:
    """Train a stage to its end and export it. Raises OutOfTime, with the state saved, where the time ends first."""
    runs = folder / "runs"
    experiment = RECIPES[recipe]()
    if "teacher" in experiment.given:
        experiment = experiment.giving(teacher=str(folder / "teacher"))
    experiment = _at_scale(experiment, scale)
    plan_file = runs / "plan.json"
    plan: dict[str, Any] = parse_json(plan_file.read_text(), str(plan_file), dict) if plan_file.exists() else {}
    if stage not in plan:
        began = time.monotonic()
        runs.mkdir(parents=True, exist_ok=True)
        pace = _pace(experiment, scale, device, runs, stage)
        left = seconds - (time.monotonic() - began) - 5
        images = 2 * pace["batch"] if scale.toy else int(0.93 * pace["rate"] * left)
        plan[stage] = {**pace, "total_images": max(images // pace["batch"], 1) * pace["batch"]}
        write_json(plan_file, plan)
    experiment = _recorded(_of_batch(experiment, int(plan[stage]["batch"])), bool(plan[stage]["graphs"]))
    experiment = _of_length(experiment, int(plan[stage]["total_images"]))
    end = Deadline(seconds * 1.1)
    started, seen = time.monotonic(), [0, 0]

    def watch(progress: Progress) -> None:
        seen[0] = seen[0] or progress.images
        seen[1] = progress.images
        if end.left <= 0 and not scale.toy:
            os.kill(os.getpid(), signal.SIGUSR1)  # as a scheduler would: the trainer saves and stops

    try:
        run_experiment(experiment, runs / stage, device=device, resume=True, on_progress=watch)
    except Interrupted:
        raise OutOfTime from None
    wall = time.monotonic() - started
    file = find_model(runs / stage)
    save_model(folder / stage, file, half=True)
    rate = (seen[1] - seen[0]) / wall
    return {**plan[stage], "wall_seconds": wall, "images_per_second": rate, "batch": experiment.training.batch}


def _at_scale(experiment: Experiment, scale: Scale) -> Experiment:
    """With the formats that suit the device, or shrunk."""
    if scale.toy:
        training = replace(experiment.training, batch=4, micro_batch=None, total_images=8)
        data = replace(experiment.data, resolution=16)
        sampler = Heun(num_steps=1) if not experiment.given else experiment.sampler
        network = shrunk(experiment.network)
        return replace(experiment, network=network, training=training, data=data, sampler=sampler)
    training = replace(experiment.training, precision="bf16", tf32=True, channels_last=True)
    return replace(experiment, training=training)


def _pace(experiment: Experiment, scale: Scale, device: torch.device, folder: Path, stage: str) -> dict[str, Any]:
    """The batch to train with, whether steps are recorded, and images a second of short runs with and without.

    The recipe's batch, unless that is slow and recording does not help. A recording is tried in a process of its own,
    which it may take with it.
    """
    batch = experiment.training.batch
    if scale.toy:
        return {"batch": batch, "graphs": False, "rate": None}
    found: dict[str, Any] = {"batch": batch, "graphs": False}
    found["rate"] = found["plain rate"] = _measured(experiment, device, folder / f"{stage}-rate")
    try:
        rate, told = _elsewhere(_recorded(experiment, True), device, folder / f"{stage}-rate-graphs")
        found |= {"recorded rate": rate, "told": told}
        if not told and rate > found["rate"]:
            return {**found, "graphs": True, "rate": rate}
    except Exception as error:  # whatever it was, plain steps go on
        found["told"] = repr(error)[:500]
    if found["rate"] < SLOW:
        larger = _measured(_of_batch(experiment, 4 * batch), device, folder / f"{stage}-rate-larger")
        if larger > 2 * found["rate"]:
            found |= {"batch": 4 * batch, "rate": larger}
    return found


def _elsewhere(experiment: Experiment, device: torch.device, folder: Path) -> tuple[float, list[str]]:
    """Images a second of a short run in a process of its own, and why its steps were not recorded.

    Raises TimeoutError, or EOFError where the process ends without a word.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_tried, args=(there, experiment, device, folder))
    process.start()
    there.close()
    try:
        if not here.poll(TRIAL):
            raise TimeoutError(f"nothing came of it in {TRIAL:g} s")
        found: tuple[float, list[str]] = here.recv()
        return found
    finally:
        process.kill()
        process.join()


def _tried(answer: Connection, experiment: Experiment, device: torch.device, folder: Path) -> None:
    with warnings.catch_warnings(record=True) as told, _fast(device):
        warnings.simplefilter("always")
        rate = _measured(experiment, device, folder)
    answer.send((rate, [str(w.message) for w in told if "training.graphs" in str(w.message)]))


def _recorded(experiment: Experiment, graphs: bool) -> Experiment:
    return replace(experiment, training=replace(experiment.training, graphs=graphs))


def _measured(experiment: Experiment, device: torch.device, folder: Path) -> float:
    """Images a second of a short run."""
    steps, marks, batch = 4 * WARM, [], experiment.training.batch

    def watch(progress: Progress) -> None:
        if progress.images in (WARM * batch, steps * batch):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            marks.append(time.monotonic())

    trial = replace(_of_length(experiment, steps * batch), sampler=None)
    run_experiment(trial, folder, device=device, resume=True, on_progress=watch)
    return (steps - WARM) * batch / (marks[1] - marks[0])


def _of_batch(experiment: Experiment, batch: int) -> Experiment:
    """With another batch, and the rate that Adam wants for it: by the root of how many times as large it is."""
    training = experiment.training
    rate = training.optimizer.lr * (batch / training.batch) ** 0.5
    training = replace(training, batch=batch, micro_batch=None, optimizer=replace(training.optimizer, lr=rate))
    return replace(experiment, training=training)


def _of_length(experiment: Experiment, total: int) -> Experiment:
    """With everything that the recipe counts in images in proportion; a snapshot and a checkpoint at the end alone."""
    training = experiment.training
    share = total / training.total_images
    optimizer, ema = training.optimizer, training.ema
    decay = optimizer.lr_decay_images
    optimizer = replace(
        optimizer,
        lr_ramp_images=int(share * optimizer.lr_ramp_images),
        lr_decay_images=None if decay is None else max(int(share * decay), 1),
        lr_cooldown_images=int(share * optimizer.lr_cooldown_images),
    )
    training = replace(
        training,
        total_images=total,
        optimizer=optimizer,
        ema=replace(ema, halflife_images=share * ema.halflife_images),
        log_images=max(total // 100, training.batch),
        snapshot_images=total,
        checkpoint_images=max(total // 3, training.batch),
        keep_checkpoints=1,
    )
    return replace(experiment, training=training)


@contextmanager
def _fast(device: torch.device) -> Iterator[None]:
    """Convolutions by the fastest kernel found."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, device.type == "cuda"
    try:
        yield
    finally:
        cudnn.benchmark = before


# --- what came of it --------------------------------------------------------------------------------------------------


def _generator(folder: Path, steps: int, device: torch.device) -> ImageGenerator:
    """Heun's steps of the teacher; of the student one jump, or a second one from where the shipped ones go on best."""
    file = find_model(folder)
    sampler: Sampler = Heun(num_steps=steps)
    if folder.name == "student":
        sampler = MultistepConsistency(sigmas=() if steps == 1 else (SECOND,))
    fast: Precision = "bf16" if device.type == "cuda" else "fp32"
    return ImageGenerator(file.model, file.spec, sampler, device, precision=fast)


def _reference(scale: Scale, resolution: int = 64) -> Reference:
    images = _pictures(16 if scale.toy else resolution)
    return embed(images.subset(range(0, len(images), 100)) if scale.toy else images, emoji_features())


@lru_cache
def _pictures(resolution: int) -> ImageSet:
    """All of the set, training pictures and others."""
    return open_images("emoji64", resolution=resolution, split="all")


def _score(generator: ImageGenerator, reference: Reference, scale: Scale, *, yardsticks: bool = False) -> Numbers:
    """fd_emoji, precision and recall of images with the set's own shares of classes, against all of the set.

    Images of twice the reference's side are halved.
    """
    count = 8 if scale.toy else SCORED
    started = time.monotonic()
    images = np.concatenate(list(draw_for_score(generator, count, reference, batch_size=256)))
    seconds = time.monotonic() - started
    if images.shape[1] == 2 * reference.image_shape[0]:
        images = halved(images)
    metrics = ("fd",) if scale.toy else ("fd", "prdc")
    report = evaluate(
        images, reference, emoji_features(generator.device), metrics=metrics, seed=0, yardsticks=yardsticks
    )
    sticks = {
        f"{name}, {kind}": getattr(s, kind) for name, s in report.yardsticks.items() for kind in ("floor", "gaussian")
    }
    return {"calls": generator.nfe, "images": count, "seconds": seconds, **report.scores, **sticks}


def halved(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 [n, H, W, C] -> [n, H/2, W/2, C]: means of 2x2."""
    n, h, w, c = images.shape
    means: npt.NDArray[np.float64] = images.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return np.rint(means).astype(np.uint8)


def _copies(folder: Path, scale: Scale, device: torch.device) -> Numbers:
    """Median distance in pixels to the nearest training image: of drawn ones, and of real ones that were held out.

    A model that copies draws images far nearer than those.
    """
    pictures = _pictures(16 if scale.toy else 64)
    parts = np.array(pictures.splits)
    train, held = (pictures.subset(np.flatnonzero(parts == name)) for name in ("train", "test"))
    count = 4 if scale.toy else len(held)
    generator = _generator(folder, 1, device)
    drawn = generator.generate(count, batch_size=256)
    return {
        name: float(np.median(nearest(images, train, k=1)[1]))
        for name, images in (("drawn", drawn), ("held out", held.images(np.arange(count))))
    }
