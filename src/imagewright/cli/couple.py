"""`imagewright couple MODEL --out FOLDER`: pairs of noise and image from a teacher, in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from imagewright.cli.command import run
from imagewright.cli.console import bar, say
from imagewright.cli.sampling import Changes, make_generator
from imagewright.data.couplings import Manifest, claim_folder, shard_fault, shard_path, standing, write_shard
from imagewright.locks import alone
from imagewright.models.files import weights_hash
from imagewright.pretrained import find_model
from imagewright.samplers.generator import ImageGenerator, sampler_to_json
from imagewright.types import UserError

EPILOG = """examples:
  imagewright couple runs/edm-digits --n 20000 --out couplings/digits
  imagewright couple emoji64-32 --n 50000 --sampler heun --steps 18 --out couplings/emoji
  imagewright couple emoji64-32 --n 50000 --sampler heun --steps 18 --out couplings/emoji --verify
  imagewright train dmd-digits --teacher runs/edm-digits --data.couplings couplings/digits
"""


def couple(
    model: Annotated[str, tyro.conf.Positional],
    out: Path,
    n: int = 10_000,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    set: tuple[str, ...] = (),  # the option's name
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes(),  # noqa: B008, frozen
    shard: int = 2048,
    dtype: str = "float16",
    verify: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Draw pairs (noise, image, class) from a model and store them. Pair i depends on (seed, i) alone.

    The same command again goes on where it was interrupted, and makes missing or broken shards anew. Given several
    times at once, on one folder, it shares the work. A larger --n adds pairs. Of the model, its weights count, not
    the path by which it is named.

    Args:
        model: a run folder, a model folder, or a shipped model.
        out: folder of the couplings.
        n: how many pairs.
        seed: of the whole set.
        sampler: as for `imagewright sample`.
        steps: number of sampler steps.
        set: further sampler settings, name=value.
        shard: pairs in a file.
        dtype: of the stored images, float16 or float32.
        verify: read every shard again and check its checksum.
        batch_size: images per network call.
        device: auto, cpu, cuda, mps.
    """
    file = find_model(model)
    generator = make_generator(file, sampler, steps, set, device, changes)
    if not generator.deterministic:
        name = type(generator.sampler).__name__
        raise UserError(
            f"sampler {name} draws at random on its way, so that its images are no function "
            "of the noise beside them; couplings need one that does not, such as --sampler heun"
        )
    origin = {
        "model": model,
        "weights_sha256": weights_hash(file.model.state_dict()),
        "sampler": sampler_to_json(generator.sampler),
        "nfe": generator.nfe,
    } | changes.record()
    manifest = Manifest(n=n, seed=seed, shard=shard, batch=batch_size, dtype=dtype, spec=file.spec, origin=origin)
    claim_folder(out, manifest)
    made = _fill(out, manifest, generator, verify)
    say(f"{n} couplings in {out}, {manifest.shards} shards, of which {made} made now ({generator.nfe} calls a pair)")


def _fill(out: Path, manifest: Manifest, generator: ImageGenerator, verify: bool) -> int:
    """Make every shard that has a fault; returns how many were made here."""
    made, waiting = 0, list(range(manifest.shards))
    with bar(f"coupling into {out}", manifest.n) as advance_to:
        done = 0
        while waiting:
            busy = []
            for index in waiting:
                with alone(_lock_path(out, index)) as lock:
                    if lock == "busy":
                        busy.append(index)
                        continue
                    now = standing(out, manifest)
                    fault = shard_fault(out, now, index, checksum=verify)
                    if fault:
                        if shard_path(out, index).exists():
                            say(f"{shard_path(out, index)} {fault}; it is made anew")
                        _make(out, now, index, generator)
                        made += 1
                done += len(manifest.rows(index))
                advance_to(done)
            if busy == waiting:  # others are at all that is left: wait for the first
                with alone(_lock_path(out, busy[0]), wait=True):
                    pass
            waiting = busy
    return made


def _make(out: Path, manifest: Manifest, index: int, generator: ImageGenerator) -> None:
    rows = manifest.rows(index)
    labels = generator.labels(len(rows), manifest.seed, rows.start)
    parts = []
    for start in range(0, len(rows), manifest.batch):
        some = list(rows[start : start + manifest.batch])
        wanted = None if labels is None else labels[start : start + manifest.batch]
        parts.append(generator.drawn(some, labels=wanted, seed=manifest.seed).cpu())
    known = np.full(len(rows), -1) if labels is None else labels
    write_shard(out, manifest, index, torch.cat(parts), torch.as_tensor(known))


def _lock_path(out: Path, index: int) -> Path:
    return out / f".shard-{index:06d}.lock"


COMMANDS: Mapping[str, Callable[..., None]] = {"": couple}


def main(args: Sequence[str]) -> None:
    """Parse and couple."""
    run(couple, args, "imagewright couple", EPILOG)
