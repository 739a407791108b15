"""`imagewright couple MODEL --out FOLDER`: pairs of noise and image from a teacher, in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from imagewright.cli.command import run
from imagewright.cli.console import bar, say
from imagewright.cli.sampling import Changes, make_generator
from imagewright.data.couplings import Manifest
from imagewright.models.files import weights_hash
from imagewright.pretrained import find_model
from imagewright.training.couple import Drawing, fill
from imagewright.types import UserError

EPILOG = """examples:
  imagewright couple runs/edm-digits --n 20000 --out couplings/digits
  imagewright couple emoji64-32 --n 50000 --sampler heun --steps 18 --out couplings/emoji
  imagewright couple emoji64-32 --n 50000 --sampler heun --steps 18 --out couplings/emoji --verify
  imagewright couple runs/edm-digits --invert digits --out couplings/digits-real
  imagewright couple runs/edm-digits --n 20000 --times 0.8 0.5 0.2 --out couplings/digits-points
  imagewright train dmd-digits --teacher runs/edm-digits --data.couplings couplings/digits
"""


def couple(
    model: Annotated[str, tyro.conf.Positional],
    out: Path,
    n: Annotated[int | None, tyro.conf.arg(aliases=("-n",))] = None,
    seed: int = 0,
    sampler: str | None = None,
    steps: int | None = None,
    set: tuple[str, ...] = (),  # the option's name
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes(),  # noqa: B008, frozen
    invert: str | None = None,
    split: str = "train",
    times: tuple[float, ...] = (),
    shard: int = 2048,
    dtype: str = "float16",
    verify: bool = False,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Draw pairs (noise, image, class) from a model and store them. Pair i depends on (seed, i) alone.

    With --invert, pair i is image i of a data set's training part and the noise of which the model would make it.

    The same command again goes on where it was interrupted, and makes missing or broken shards anew. Given several
    times at once, on one folder, it shares the work. A larger --n adds pairs. Of the model, its weights count, not
    the path by which it is named. Of a model in an autoencoder's latents pairs are of latents, for students beside it.

    Args:
        model: a run folder, a model folder, or a shipped model.
        out: folder of the couplings.
        n: how many pairs; default 10,000, or every image that is inverted.
        seed: of the whole set.
        sampler: as for `imagewright sample`.
        steps: number of sampler steps.
        set: further sampler settings, name=value.
        invert: a data set whose images are turned into noise, in place of noise into images.
        split: of that set; train alone is allowed.
        times: of the straight path, in (0, 1), decreasing: points of the trajectories that are stored too.
        shard: pairs in a file.
        dtype: of the stored images, float16 or float32.
        verify: read every shard again and check its checksum.
        batch_size: images per network call.
        device: auto, cpu, cuda, mps.
    """
    if split != "train":
        raise UserError(f"--split is {split!r}; images that are held out for measuring are not to be learnt from")
    file = find_model(model)
    generator = make_generator(file, sampler, steps, set, device, changes)
    weights = weights_hash(file.model.state_dict())
    drawing = Drawing.of(generator, model, weights, invert, times, changes=changes.record())
    if n is None:
        n = 10_000 if drawing.images is None else len(drawing.images)
    manifest = Manifest(
        n=n, seed=seed, shard=shard, batch=batch_size, dtype=dtype, spec=file.seen, origin=drawing.origin,
        inverted=invert is not None, times=times,
    )  # fmt: skip
    with bar(f"coupling into {out}", n) as advance_to:
        made = fill(out, manifest, drawing, verify=verify, say=say, advance_to=advance_to)
    calls = drawing.origin["nfe"]
    say(f"{n} couplings in {out}, {manifest.shards} shards, of which {made} made now ({calls} calls a pair)")


COMMANDS: Mapping[str, Callable[..., None]] = {"": couple}


def main(args: Sequence[str]) -> None:
    """Parse and couple."""
    run(couple, args, "imagewright couple", EPILOG)
