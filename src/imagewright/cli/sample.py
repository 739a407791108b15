"""`imagewright sample MODEL`: images, a grid, an archive, a trajectory picture."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from imagewright.cli.command import run
from imagewright.cli.console import bar, say
from imagewright.cli.sampling import Changes, make_generator
from imagewright.files import read_json, replacing, write_json
from imagewright.models.files import weights_hash
from imagewright.pretrained import find_model, shipped
from imagewright.samplers.generator import ImageGenerator, sampler_to_json
from imagewright.training.distributed import Processes, processes
from imagewright.training.snapshots import grid, image_origin, read_image, save_image
from imagewright.types import UserError

GRID = 400
"""Images on the grid, the first of all: a sheet of 50,000 is no picture."""

EPILOG = """examples:
  imagewright sample emoji64-32 --n 64
  imagewright sample emoji64-32 --n 9 --label 5 --trajectory
  imagewright sample runs/edm-digits --steps 9 --set S_churn=10 --seed 7
  imagewright sample emoji64-32 --sampler restart-cifar10-vp-75
  imagewright sample runs/edm-digits --guidance auto --guide runs/small --weight 2 --interval 0.2 3
  imagewright sample runs/cd-digits --set sigmas=[0.8] --npz --out two-steps
  imagewright sample runs/guided-digits --weight 2       # a student that is told the strength: one call a step
"""


def sample(
    model: Annotated[str, tyro.conf.Positional],
    n: Annotated[int, tyro.conf.arg(aliases=("-n",))] = 64,
    seed: int = 0,
    first: int = 0,
    label: tuple[int, ...] = (),
    class_name: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    set: tuple[str, ...] = (),  # the option's name
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes(),  # noqa: B008, frozen
    out: Path = Path("samples"),
    npz: bool = False,
    trajectory: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Draw images. Image i of a seed has the same noise whatever the batch size, the device count or an interruption.

    Several processes, started by torchrun, draw a batch each in turn, with the bits of one process.

    Writes 000000.png ... and grid.png (of the first 400) into --out; the same command again goes on where it was
    interrupted.

    Args:
        model: a run folder, a model folder, or a shipped model.
        n: how many images.
        seed: of the whole set; image i depends on (seed, i) alone.
        first: index of the first image: `--n 100 --first 100` draws images 100 to 199 of the seed.
        label: class indices, one for all images or one for each; default drawn uniformly per image, of the classes that
            the model saw. -1 = none.
        class_name: one class for all images, by name.
        sampler: heun, restart, dpm-solver++, unipc, ddim, euler, ...; default the one saved with the model.
        steps: number of sampler steps.
        set: further sampler settings, name=value.
        out: folder for the pictures.
        npz: also write samples.npz (images uint8 [n, H, W, C], labels).
        trajectory: also write trajectory.png, the way from noise to image.
        batch_size: images per network call.
        device: auto, cpu, cuda, mps.
    """
    with processes() as group:
        _sample(
            model, n, seed, first, label, class_name, sampler, steps, set, changes, out, npz, trajectory, batch_size,
            device, group,
        )  # fmt: skip


def _sample(
    model: str,
    n: int,
    seed: int,
    first: int,
    label: tuple[int, ...],
    class_name: str | None,
    sampler: str | None,
    steps: int | None,
    set: tuple[str, ...],
    changes: Changes,
    out: Path,
    npz: bool,
    trajectory: bool,
    batch_size: int,
    device: str,
    group: Processes,
) -> None:
    """What the command does, in one process of several."""
    file = find_model(model)
    generator = make_generator(file, sampler, steps, set, device, changes)
    labels = _labels(generator, n, seed, first, label, class_name)
    record = {
        "model": model,
        "weights_sha256": weights_hash(file.model.state_dict()),
        "sampler": sampler_to_json(generator.sampler),
        "seed": seed,
        "label": class_name if class_name is not None else list(label),
    } | changes.record()
    if group.is_first:
        _claim(out, record)
    group.wait()
    keep = n if npz else min(n, GRID)
    images = _draw(generator, n, first, seed, labels, out, batch_size, _digest(record), group, keep=keep)
    if not group.is_first:
        return
    shown = images[:GRID]
    save_image(out / "grid.png", grid(shown, _columns(len(shown))), scale=max(1, 64 // generator.spec.resolution))
    if npz:
        with replacing(out / "samples.npz") as aside, aside.open("wb") as stream:
            # arr_0 is where evaluators of ADM's kind look.
            np.savez_compressed(stream, arr_0=images, images=images, labels=np.asarray(labels or [-1] * n))
    if trajectory:
        from imagewright.report.figures import trajectory_picture  # matplotlib, which pictures do without

        save_image(out / "trajectory.png", trajectory_picture(generator, seed=seed, labels=labels), scale=1)
    of = "" if n <= GRID else f" of the first {GRID}"
    say(f"{n} images in {out} ({generator.nfe} network calls each); grid{of}: {out / 'grid.png'}")


def _draw(
    generator: ImageGenerator,
    n: int,
    first: int,
    seed: int,
    labels: list[int] | None,
    out: Path,
    batch_size: int,
    digest: str,
    group: Processes,
    *,
    keep: int,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Draw what is not there yet; returns the first `keep` images, on the first process.

    Several processes draw a batch each in turn.

    Pictures are not flushed to disk one by one, which takes longer than drawing them: after a power failure some may be
    empty, and are drawn again.
    """
    shape = (generator.spec.resolution, generator.spec.resolution, generator.spec.channels)
    images = np.zeros((keep, *shape), np.uint8)
    paths = [out / f"{first + i:06d}.png" for i in range(n)]
    missing = [i for i in range(n) if not _there(paths[i])]
    for i in sorted({*range(n)} - {*missing}):
        if image_origin(paths[i]) != f"{digest} {first + i}":
            raise UserError(f"{paths[i]} is not of this set of samples; choose another --out, or move it away")
        if i < keep:
            images[i] = read_image(paths[i], shape)
    group.wait()  # every process has seen what is there
    others: list[int] = []
    with bar("sampling", n) as advance_to:
        advance_to(n - len(missing))
        for number, start in enumerate(range(0, len(missing), batch_size)):
            rows = missing[start : start + batch_size]
            if number % group.world != group.rank:
                others += rows
                continue
            wanted = None if labels is None else [labels[i] for i in rows]
            drawn = generator.at([first + i for i in rows], labels=wanted, seed=seed)
            for i, image in zip(rows, drawn, strict=True):
                if i < keep:
                    images[i] = image
                save_image(paths[i], image, origin=f"{digest} {first + i}", flush=False)
            advance_to(n - len(missing) + start + len(rows))
    group.wait()
    for i in others if group.is_first else ():
        if i < keep:
            images[i] = read_image(paths[i], shape)
    return images


def _there(path: Path) -> bool:
    """Whether something stands at a picture's path, an empty file not counted."""
    return os.path.lexists(path) and not (path.is_file() and path.stat().st_size == 0)


def _labels(
    generator: ImageGenerator, n: int, seed: int, first: int, label: tuple[int, ...], class_name: str | None
) -> list[int] | None:
    spec = generator.spec
    if class_name is not None:
        if class_name not in spec.class_names:
            names = ", ".join(spec.class_names) or "none"
            raise UserError(f"this model has no class {class_name!r}; its classes are {names}")
        label = (spec.class_names.index(class_name),)
    if not label:
        drawn = generator.labels(n, seed, first)
        return None if drawn is None else [int(v) for v in drawn]
    if len(label) not in (1, n):
        raise UserError(f"--label has {len(label)} entries for --n {n}; give one, or one for each image")
    bad = [v for v in label if not -1 <= v < spec.num_classes]
    if bad:
        allowed = f"-1 to {spec.num_classes - 1}" if spec.num_classes else "-1 (the model has no classes)"
        raise UserError(f"--label {bad[0]} is not a class of this model; allowed: {allowed}")
    return list(label) * n if len(label) == 1 else list(label)


def _digest(record: dict[str, Any]) -> str:
    """By which a picture on disk is known to be of this set: where the model lies does not count."""
    counted = {name: value for name, value in record.items() if name not in ("model", "guide")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Go on with the same samples; refuse to mix two sets in one folder."""
    path = out / "samples.json"
    if path.exists():
        before = read_json(path, dict)
        changed = [k for k in record if before.get(k) != json.loads(json.dumps(record[k]))]
        if changed:
            raise UserError(f"{out} holds samples with another {', '.join(changed)}; choose another --out")
    write_json(path, record)


def _columns(n: int) -> int:
    return math.ceil(math.sqrt(n))


COMMANDS: Mapping[str, Callable[..., None]] = {"": sample}


def main(args: Sequence[str]) -> None:
    """Parse and sample."""
    run(sample, args, "imagewright sample", f"Shipped models: {', '.join(shipped()) or 'none'}\n\n{EPILOG}")
