"""`imagewright evaluate MODEL | FOLDER | ZIP`: distances with yardsticks, precision, recall, bits, accuracy."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro

from imagewright.cli.command import invoked, run
from imagewright.cli.console import OUT, bar, say, table
from imagewright.cli.evaluate_accuracy import evaluate_accuracy, show_accuracy
from imagewright.cli.evaluate_bits import evaluate_bits, show_bits
from imagewright.cli.evaluate_reconstruction import evaluate_reconstruction, show_reconstruction
from imagewright.cli.evaluate_retrieval import evaluate_retrieval, show_retrieval
from imagewright.cli.sampling import Changes, make_generator
from imagewright.cli.score_file import keep, require_keepable
from imagewright.cli.scoring import extractor_for, real_images, reference_images
from imagewright.data import ImageSet, open_images
from imagewright.metrics.bits import BitsSettings
from imagewright.metrics.draws import ClassLaw, class_shares, draw_for_score, labels_for_score
from imagewright.metrics.evaluate import METRICS, OPTIONAL, Report, evaluate, feasible
from imagewright.metrics.features import FeatureExtractor, in_batches
from imagewright.metrics.reference import Reference, embed
from imagewright.models.files import ModelFile, has_model
from imagewright.models.vatt import VATTEncoder
from imagewright.pretrained import CHAIN, RUN, find_model, folder_of, shipped
from imagewright.samplers.generator import sampler_to_json
from imagewright.training.distributed import Processes, pick_device, processes
from imagewright.training.together import SharedGenerator
from imagewright.types import DataSpec, UserError, kind_of

SEED = 1
"""Of the images drawn, where none is asked for."""
EPILOG = """examples:
  imagewright evaluate runs/edm-digits
  imagewright evaluate runs/edm-digits --steps 3 5 9 18    # one row per number of steps
  imagewright evaluate emoji64-32 --n 1000 --metrics fd prdc
  imagewright evaluate runs/causal-digits --metrics bpd    # bits per dimension of the held-out images
  imagewright evaluate emoji64-32 --metrics bpd --ode-steps 32 --probes 4
  imagewright evaluate runs/edm-digits --seeds 1 2 3 4 5   # mean and spread
  imagewright evaluate runs/wrn-digits                     # a classifier's accuracy on held-out images
  imagewright evaluate runs/edm-digits --features runs/vcmamba-digits --metrics fd kid accuracy
  imagewright evaluate runs/vatt-standin-digits            # captions that look for their videos
  imagewright evaluate runs/kl-digits                      # what an autoencoder or tokenizer gives back
  imagewright evaluate my-images.zip --data emoji64
  imagewright evaluate runs/auto-photos-64 --features photos.safetensors --metrics fd kid fd_inf
  imagewright evaluate MODEL --data imagenet-64x64.zip --inception pt_inception-2015-12-05-6726825d.pth --n 50000
"""


def evaluate_command(
    target: Annotated[str, tyro.conf.Positional],
    data: str | None = None,
    split: str | None = None,
    n: Annotated[int | None, tyro.conf.arg(aliases=("-n",))] = None,
    seed: int = SEED,
    seeds: tuple[int, ...] = (),
    metrics: tuple[str, ...] = METRICS,
    classes: ClassLaw = "reference",
    sampler: str | None = None,
    steps: tuple[int, ...] = (),
    set: tuple[str, ...] = (),  # the option's name
    changes: Annotated[Changes, tyro.conf.arg(name="")] = Changes(),  # noqa: B008, frozen
    features: str | None = None,
    inception: str | None = None,
    likelihood: Annotated[BitsSettings, tyro.conf.arg(name="")] = BitsSettings(),  # noqa: B008, frozen
    yardsticks: bool = True,
    out: Path | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Measure images against real ones, or real ones under a model (bpd).

    Every distance comes with yardsticks at the same number of images: real against real (floor), a Gaussian fit with
    full covariance and noise (ceilings). Bits per dimension come with those of lossless files (PNG, WebP). Of a
    classifier its accuracy is measured: how often it names the class, and has it among its five likeliest; of a model
    of pictures and texts in every language of its prompts. Of an encoder of video, sound and words it is measured how
    often a caption finds its video, and what a linear probe of the pooled vectors names. Of an autoencoder or tokenizer
    what comes back is: PSNR, SSIM, perceptual and Frechet distance, and a linear probe of latents.

    Args:
        target: a run folder, a model folder, a shipped model; or a folder or zip of images.
        data: real images: digits, emoji64, a zip or a folder; default what the model was trained on.
        split: of the real images (train, test, all); default all, for bpd, accuracy and reconstructions test.
        n: images to draw; default as many as there are real ones (50,000 at most). Of a set of images, and for bpd and
            accuracy of the real ones: how many to score, evenly chosen; default all.
        seed: of the images drawn.
        seeds: several of them: as many images of each are measured, and their mean and spread shown.
        metrics: of fd, kid, is, prdc; fd_inf, the distance carried on to infinitely many images; accuracy, the share of
            images in which the features' classifier sees the class that was asked for; and bpd, the bits per
            dimension of the real images, by the model's exact likelihood, its bound, or its probability flow.
        classes: which are drawn, of a model that is told them: each as often as the real images have it (reference),
            or all alike (uniform).
        sampler: as for `imagewright sample`.
        steps: one measurement for each number of sampler steps.
        set: further sampler settings, name=value.
        features: what is compared: digits or emoji (shipped classifiers), an encoder's file (`imagewright data
            encoder`), a classifier's run or model, or dinov2:FOLDER or clip:FOLDER; default the set's own classifier,
            else that of emoji. Every score is named after it.
        inception: the public Inception weight file (path, folder or URL), for FID.
        yardsticks: measure them too.
        out: where the result goes; default metrics.json in the run folder. Earlier entries are kept.
        batch_size: images per call of the network, or of the feature extractor where images are given.
        device: auto, cpu, cuda, mps.
    """
    with processes() as group:
        _evaluate_command(
            target, data, split, n, seed, seeds, metrics, classes, sampler, steps, set, changes, features, inception,
            likelihood, yardsticks, out, batch_size, device, group,
        )  # fmt: skip


def _evaluate_command(
    target: str,
    data: str | None,
    split: str | None,
    n: int | None,
    seed: int,
    seeds: tuple[int, ...],
    metrics: tuple[str, ...],
    classes: ClassLaw,
    sampler: str | None,
    steps: tuple[int, ...],
    set: tuple[str, ...],
    changes: Changes,
    features: str | None,
    inception: str | None,
    likelihood: BitsSettings,
    yardsticks: bool,
    out: Path | None,
    batch_size: int,
    device: str,
    group: Processes,
) -> None:
    """What the command does, in one process of several: they draw together, and the first one measures."""
    known = (*METRICS, *OPTIONAL, "bpd")
    unknown = [m for m in metrics if m not in known]
    if unknown:
        raise UserError(f"metrics has no {unknown[0]!r}; there are {', '.join(known)}")
    if seeds and (seed != SEED or len(dict.fromkeys(seeds)) < len(seeds)):
        raise UserError("give --seed or --seeds, and each of these once")
    is_chain = (Path(target) / CHAIN).exists()
    target = str(folder_of(target)) if is_chain else target
    is_model = is_chain or target in shipped() or has_model(Path(target)) or (Path(target) / RUN).exists()
    if "bpd" not in metrics and likelihood != BitsSettings():
        raise UserError("--passes, --ode-steps and --probes go with --metrics bpd")
    if not is_model:
        if "bpd" in metrics:
            raise UserError(f"{target} is no model; bpd is how probable a model finds real images")
        if "accuracy" in metrics:
            raise UserError(f"{target} is a set of images, of which no classes were asked; accuracy is a model's")
        drawing: dict[str, Any] = {
            "seed": seed != SEED,
            "seeds": seeds,
            "classes": classes != "reference",
            "changes": changes.record(),
        }
        _refuse_unused(f"{target}, which is a set of images", **drawing, sampler=sampler, steps=steps, set=set)
        if not group.is_first:
            return
        if out is not None:
            require_keepable(out)
        extractor = None if data is None else extractor_for(data, inception, pick_device(device), features)
        _evaluate_images(target, data, split or "all", n, metrics, extractor, yardsticks, out, batch_size)
        return
    file = find_model(target)
    path = out or (Path(target) / "metrics.json" if Path(target).is_dir() else None)
    if path is not None:
        require_keepable(path)
    if kind_of(file.model) == "encoder":
        unused: dict[str, Any] = {
            "metrics": metrics != METRICS,
            "sampler": sampler,
            "steps": steps,
            "set": set,
            "seeds": seeds,
        }
        unused |= {"seed": seed != SEED, "classes": classes != "reference", "changes": changes.record()}
        _refuse_unused(f"{target}, which draws no images", **unused, features=features, inception=inception)
        if not group.is_first:
            return
        if isinstance(file.model, VATTEncoder):
            entry = evaluate_retrieval(target, file, data, split or "test", n, batch_size, device)
            show_retrieval(entry)
            _keep("retrievals", [_of(file, entry)], path)
            return
        found = evaluate_accuracy(target, file, data, split, n, batch_size, device)
        show_accuracy(found)
        _keep("accuracies", [_of(file, entry) for entry in found], path)
        return
    if kind_of(file.model) in ("codec", "autoencoder"):
        unused = {"metrics": metrics != METRICS, "sampler": sampler, "steps": steps, "set": set, "seeds": seeds}
        unused |= {"classes": classes != "reference", "changes": changes.record()}
        _refuse_unused(f"{target}, which draws no images", **unused)
        if group.is_first:
            entry = evaluate_reconstruction(
                target, file, data, split or "test", n, seed, features, inception, batch_size, device
            )
            show_reconstruction(entry)
            _keep("reconstructions", [_of(file, entry)], path)
        return
    if "bpd" in metrics:
        metrics = tuple(m for m in metrics if m != "bpd")
        if not metrics:
            unused = {"sampler": sampler, "steps": steps, "set": set, "inception": inception, "features": features}
            _refuse_unused("bpd, which draws no images", **unused, seeds=seeds, classes=classes != "reference")
        if group.is_first:
            entry = evaluate_bits(target, file, data, split or "test", n, seed, likelihood, changes, batch_size, device)
            show_bits(entry)
            _keep("likelihoods", [_of(file, entry)], path)
        if not metrics:
            return
    if not group.is_first:
        for number in steps or (None,):
            generator = make_generator(file, sampler, number, set, device, changes)
            for _ in seeds or (seed,):
                SharedGenerator(generator, group).help()
        return
    reference = real_images(target, data, file.spec, split or "all")
    named = reference.spec.name if data is None else data
    extractor = extractor_for(named, inception, pick_device(device), features)
    embedded = embed(reference, extractor)
    count = n or min(len(reference), 50_000)
    metrics = _feasible(metrics, count, len(reference))
    entries: list[dict[str, Any]] = []
    for number in steps or (None,):
        generator = make_generator(file, sampler, number, set, device, changes)
        way = sampler_to_json(generator.sampler) | changes.record()
        told = _classes(file.spec, embedded, classes)
        for each in seeds or (seed,):
            of_seed = f", seed {each}" if seeds else ""
            with bar(f"evaluating {target} at {generator.nfe} calls{of_seed}", count) as advance_to:
                source = generator if group.world == 1 else SharedGenerator(generator, group)
                drawn = draw_for_score(source, count, embedded, classes=classes, seed=each, batch_size=batch_size)
                clock = _Stopwatch(drawn, generator.device)
                sticks = yardsticks and each == (seeds or (seed,))[0]  # they do not depend on the seed
                asked = labels_for_score(source, count, embedded, classes=classes, seed=each)
                report = evaluate(
                    clock,
                    embedded,
                    extractor,
                    metrics=metrics,
                    seed=each,
                    labels=asked,
                    yardsticks=sticks,
                    on_progress=advance_to,
                )
            cost = {"peak_bytes": clock.peak_bytes, "device": generator.device.type}
            entries.append(_entry(target, way, generator.nfe, clock.seconds, report) | {"classes": told} | cost)
    _say_if_uniform(entries[0]["classes"], classes)
    _table(entries)
    _keep("reports", [_of(file, entry) for entry in entries], path)


def _feasible(metrics: tuple[str, ...], count: int, real: int) -> tuple[str, ...]:
    """The metrics that so many images allow; says which they do not, before the work. UserError where none is left."""
    possible, impossible = feasible(metrics, count, real)
    if not possible:
        raise UserError("; ".join(impossible))
    for reason in impossible:
        say(f"left out: {reason}")
    return possible


def _of(file: ModelFile, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry that says of which weights it is, and how it was measured."""
    seen = file.origin.get("images_seen")
    return {**entry, "weights_sha256": file.weights_sha256, "images_seen": seen, "command": invoked()}


def _refuse_unused(on: str, **options: Any) -> None:
    for name, value in options.items():
        if value:
            named = next(iter(value)) if name == "changes" else name
            raise UserError(f"--{named.replace('_', '-')} has no effect on {on}")


def _classes(spec: DataSpec, reference: Reference, wanted: ClassLaw) -> dict[str, Any] | None:
    """By which law classes were drawn, and how often each in the mean; None: the model is told none."""
    law, shares = class_shares(spec, reference, wanted)
    return None if shares is None else {"law": law, "shares": [round(float(share), 6) for share in shares]}


def _say_if_uniform(drawn: dict[str, Any] | None, wanted: ClassLaw) -> None:
    if drawn is not None and drawn["law"] != wanted:
        say("note: the real images do not say how often the model's classes come; they were drawn alike")


def _evaluate_images(
    target: str,
    data: str | None,
    split: str,
    n: int | None,
    metrics: tuple[str, ...],
    extractor: FeatureExtractor | None,
    yardsticks: bool,
    out: Path | None,
    batch_size: int,
) -> None:
    if not Path(target).exists():
        raise UserError(f"{target} is neither a model ({', '.join(shipped())}, or a run folder) nor a set of images")
    if data is None or extractor is None:
        raise UserError(f"{target} is no model; say with --data with which real images its pictures are compared")
    images = open_images(target, split="all", labels=False)
    if n is not None:
        if n > len(images):
            raise UserError(f"--n is {n}; there are {len(images)} images in {target}")
        images = images.subset([i * len(images) // n for i in range(n)])
    reference = reference_images(data, images.spec, split, own_colours=True)
    if images.spec.channels == 3 and reference.spec.channels == 1 and _all_grey(images):
        images = ImageSet.of(images.images()[..., :1], name=target)  # ADM's files always have three
    if images.spec.channels != reference.spec.channels:
        reference = reference_images(data, images.spec, split)
    metrics = _feasible(metrics, len(images), len(reference))
    batches = in_batches(images, batch_size)
    with bar(f"evaluating {target}", len(images)) as advance_to:
        report = evaluate(batches, reference, extractor, metrics=metrics, yardsticks=yardsticks, on_progress=advance_to)
    entries = [_entry(target, None, 0, 0.0, report)]
    _table(entries)
    _keep("reports", [{**entry, "command": invoked()} for entry in entries], out)


def _all_grey(images: ImageSet) -> bool:
    return all((batch == batch[..., :1]).all() for batch in in_batches(images))


def most_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on a GPU took until now, or this process in all; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


class _Stopwatch:
    """Batches of images, and the seconds and memory that drawing them took (not those of scoring)."""

    def __init__(self, batches: Iterator[npt.NDArray[np.uint8]], device: torch.device) -> None:
        self._batches, self.seconds, self._device, self.peak_bytes = batches, 0.0, device, 0

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        while True:
            started = time.monotonic()
            batch = next(self._batches, None)
            self.seconds += time.monotonic() - started
            self.peak_bytes = max(self.peak_bytes, most_memory(self._device))
            if batch is None:
                return
            yield batch


def _entry(target: str, sampler: dict[str, Any] | None, nfe: int, seconds: float, report: Report) -> dict[str, Any]:
    return {"target": target, "sampler": sampler, "nfe": nfe, "seconds": seconds, "report": report.as_dict()}


def _keep(kind: str, entries: list[dict[str, Any]], path: Path | None) -> None:
    if path is not None:
        keep({kind: entries}, path)
        say(f"written to {path}")


def _table(entries: list[dict[str, Any]]) -> None:
    names = [s for s in entries[0]["report"]["scores"] if not s.endswith(("_std", "_stderr"))]
    rows = table("", "calls", *names)
    several = len({entry["report"]["seed"] for entry in entries}) > 1
    for nfe, group in groupby(entries, key=lambda entry: entry["nfe"]):
        measured = list(group)
        for entry in measured:
            scores, told = entry["report"]["scores"], f", seed {entry['report']['seed']}" if several else ""
            rows.add_row(entry["target"] + told, str(nfe), *(f"{scores[s]:.4g}" for s in names))
        if several:
            spread = seed_spread([entry["report"]["scores"] for entry in measured], names)
            rows.add_row(f"mean and spread of {len(measured)} seeds", str(nfe), *spread)
    sticks: dict[str, Any] = next(
        (e["report"]["yardsticks"] for e in reversed(entries) if e["report"]["yardsticks"]), {}
    )
    for kind, row in _yardstick_rows(sticks).items():
        rows.add_row(kind, "", *(row.get(s, "") for s in names), style="dim")
    OUT.print(rows)
    for note in dict.fromkeys(note for entry in entries for note in entry["report"]["notes"]):
        say(f"note: {note}")


def seed_spread(scores: list[dict[str, float]], names: Sequence[str]) -> list[str]:
    """Mean and standard deviation (divisor n - 1) of each score over seeds, in words."""
    columns = [[each[name] for each in scores] for name in names]
    return [f"{np.mean(column):.4g} ± {np.std(column, ddof=1):.2g}" for column in columns]


def _yardstick_rows(yardsticks: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Yardsticks by row: floor, Gaussian fit, noise."""
    kinds = {"real against real": "floor", "Gaussian fit": "gaussian", "noise": "noise"}
    return {
        f"({title})": {score: f"{stick[kind]:.4g}" for score, stick in yardsticks.items()}
        for title, kind in kinds.items()
        if yardsticks
    }


COMMANDS: Mapping[str, Callable[..., None]] = {"": evaluate_command}


def main(args: Sequence[str]) -> None:
    """Parse and evaluate."""
    run(evaluate_command, args, "imagewright evaluate", EPILOG)
