"""What a page shows of one run: read from its folder, and drawn from its model.

Contract  `collect_run` reads the run folder (see `training.experiment`) and writes nothing. What is not there
          yet is named in `RunSection.missing` with the command that makes it; damage raises UserError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from imagewright import limits
from imagewright.data import ImageSet, open_images, to_uint8
from imagewright.data.config import DataConfig
from imagewright.data.pixels import BadPicture, decode
from imagewright.files import read_bytes
from imagewright.metrics import FeatureExtractor, nearest
from imagewright.metrics.extractors import OF_DATA, named_extractor
from imagewright.metrics.records import read_scores
from imagewright.models.files import has_model, read_model_record
from imagewright.models.kinds import KINDS
from imagewright.pretrained import load
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.distributed import pick_device
from imagewright.training.log import read_log
from imagewright.training.record import experiment_from_json, get_field, read_record
from imagewright.types import DataSpec, UserError, kind_of

Images = npt.NDArray[np.uint8]
OnProgress = Callable[[int, int], None]

PER_CLASS = 10
MOST_CLASSES = 20
MOST_SNAPSHOTS = 6
MOST_STEPS = 12
TRAJECTORIES = 4
NEIGHBOURS = 4
MOST_QUERIES = 8
MOST_REAL = 20_000
"""Real images among which neighbours are sought; of more, this many are taken evenly."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Why a piece is not on the page, and the command that makes it."""

    reason: str
    command: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A grid of samples that the run left after `images_seen` images."""

    images_seen: int
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One entry of metrics.json: a sampler, its cost, and the report (`metrics.Report` as plain values).

    seconds: for drawing all the images; 0 where it was not measured. peak_bytes: the most memory by then, a GPU's or
    the whole process's; None = not recorded.
    classes: by which law they were drawn, and the share of each; None = the model is told none, or nothing is known.
    weights_sha256: of the weights measured; None = not recorded.
    """

    sampler: Mapping[str, Any]
    nfe: int
    seconds: float
    report: Mapping[str, Any]
    command: tuple[str, ...] = ()
    classes: Mapping[str, Any] | None = None
    weights_sha256: str | None = None
    peak_bytes: int | None = None

    @property
    def distance(self) -> tuple[str, float] | None:
        """Name and value of the Frechet distance: "fid" or "fd_<extractor>"."""
        scores: Mapping[str, float] = self.report["scores"]
        return next(((k, v) for k, v in scores.items() if k == "fid" or k.startswith("fd_")), None)

    @property
    def images_per_second(self) -> float | None:
        """Of drawing; None where no time was kept."""
        return self.report["num_images"] / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """Samples of one class, uint8 [n, H, W, C]."""

    name: str
    images: Images


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The way of n images through S sampler steps.

    x, estimate: the state, clipped to [-1, 1], and the estimate of x0, each uint8 [S, n, H, W, C].
    sigmas:      noise level of x at each of the steps; for a flow map of the x it jumps from; for a token model the
                 share of tokens that were unknown.
    tokens:      whether it is a token model's; x and estimate are then the same.
    """

    x: Images
    estimate: Images
    sigmas: tuple[float, ...]
    tokens: bool = False

    def thinned(self, most: int = MOST_STEPS) -> Trajectory:
        """At most that many steps, evenly chosen, first and last among them."""
        keep = evenly(len(self.sigmas), most)
        sigmas = tuple(self.sigmas[i] for i in keep)
        return replace(self, x=self.x[keep], estimate=self.estimate[keep], sigmas=sigmas)


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The training images nearest to each of n samples in one space.

    real: uint8 [n, k, H, W, C], nearest first; indices, distances: [n, k].
    typical, held_out: median distance to the nearest training image;
                       of all samples drawn, and of real images that the run has not seen.
    """

    space: str
    real: Images
    indices: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float64]
    typical: float
    held_out: float | None


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Everything the page shows of one run. Empty pieces are explained in `missing`, by field name.

    weight: strength of the guidance at which images were drawn; None = the model is told none.
    likelihoods:  entries of metrics.json, each with a `metrics.bits.BitsReport` as plain values, and "codecs" in it.
    first_images: images 0 .. 9 of the seed; runs of the same data get the same noise and labels.
    """

    name: str
    folder: Path
    seed: int
    model: Mapping[str, Any] = field(default_factory=dict)
    experiment: Mapping[str, Any] = field(default_factory=dict)
    sampler_nfe: int | None = None
    weight: float | None = None
    log: tuple[Mapping[str, float], ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    measures: tuple[Measure, ...] = ()
    likelihoods: tuple[Mapping[str, Any], ...] = ()
    classes: tuple[ClassRow, ...] = ()
    first_images: Images | None = None
    first_labels: tuple[str, ...] = ()
    trajectory: Trajectory | None = None
    neighbours: tuple[Neighbours, ...] = ()
    num_real: int = 0
    missing: Mapping[str, Missing] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of the method's class."""
        recorded = get_field(dict(self.experiment), "experiment.method.class")
        return str(self.model.get("origin", {}).get("method") or recorded or "unknown")

    @property
    def parameters(self) -> int | None:
        return self.model.get("parameters")

    @property
    def data(self) -> Mapping[str, Any]:
        """The model's `DataSpec` as plain values; empty without a model."""
        found: Mapping[str, Any] = self.model.get("data", {})
        return found


def collect_run(
    folder: Path,
    *,
    seed: int = 0,
    weight: float | None = None,
    features: str | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> RunSection:
    """Read a run folder and draw from its model.

    seed: of all images drawn. weight: strength of the guidance, of a model that is told it; None = its own.
    features: the encoder in whose features the nearest training images are sought (`metrics.extractors`); None = the
    data's own classifier, where there is one.
    device: auto, cpu, cuda, mps.
    on_progress: called with (images drawn, images to draw).
    Raises UserError when the folder holds no run, or a file in it is damaged.
    """
    if not (folder / "experiment.json").exists() and not has_model(folder):
        raise UserError(f"{folder} holds neither experiment.json nor a model; give a run folder")
    missing: dict[str, Missing] = {}
    pieces: dict[str, Any] = _read(folder, missing)
    kind = pieces["model"].get("kind", "")
    if kind in KINDS and KINDS[kind].answers and kind != "encoder":
        what = KINDS[kind].what
        reason = f"It {what}, and draws no images; snapshots show pictures, and beneath each row what comes back."
        missing["model"] = Missing(reason=reason)
    elif kind == "encoder":
        missing["model"] = Missing(reason="An encoder draws no images; `imagewright evaluate` measures what it knows.")
    elif pieces["model"]:
        # Resolved, so that a run folder named like a shipped model is still the folder.
        asked = weight if pieces["model"]["model"].get("weights") else None
        generator = load(folder.resolve(), device=pick_device(device), weight=asked)
        pieces["weight"] = getattr(generator.model, "weight", None)
        pieces |= _draw(generator, seed, on_progress or (lambda done, total: None))
        samples = np.concatenate([pieces["first_images"], *(row.images for row in pieces["classes"])])
        pieces |= _compare(samples, generator.spec, pieces["experiment"], folder, features, missing)
    name = folder.name or folder.resolve().name
    return RunSection(name=name, folder=folder, seed=seed, missing=missing, **pieces)


# --- what the folder holds ----------------------------------------------------------------------------------


def _read(folder: Path, missing: dict[str, Missing]) -> dict[str, Any]:
    """Files of the run; notes what there is not."""
    files = {name: folder / name for name in ("experiment.json", "log.jsonl", "metrics.json")}
    experiment: Mapping[str, Any] = read_record(folder) if files["experiment.json"].exists() else {}
    model: Mapping[str, Any] = read_model_record(folder) if has_model(folder) else {}
    log = _one_line_per_step(read_log(files["log.jsonl"])) if files["log.jsonl"].exists() else ()
    snapshots = _snapshots(folder / "samples")
    go_on = ("train", "--resume", str(folder))
    if not experiment:
        missing["experiment"] = Missing(reason="This folder has no experiment.json: the model was trained elsewhere.")
    if not model:
        reason = "There is no model yet: the run has not reached its first snapshot. To go on with it:"
        missing["model"] = Missing(reason=reason, command=go_on)
    if not log:
        missing["log"] = Missing(reason="No training log was found here (log.jsonl).")
    if not snapshots:
        missing["snapshots"] = Missing(reason="No snapshots were left during training (samples/*.png).")
    measured = files["metrics.json"].exists()
    current = model.get("weights_sha256")
    every = read_measures(files["metrics.json"]) if measured else ()
    measures = tuple(m for m in every if m.weights_sha256 in (None, current))
    again = ("evaluate", str(folder))
    if not measures:
        missing["measures"] = Missing(reason="This run has not been measured yet. To measure it:", command=again)
    if len(measures) < len(every):
        old = f"{len(every) - len(measures)} of {len(every)} scores are of other weights than the run's, and not shown."
        missing["stale"] = Missing(reason=f"{old} To measure these:", command=again)
    return {
        "experiment": experiment,
        "model": model,
        "log": log,
        "snapshots": snapshots,
        "measures": measures,
        "likelihoods": read_likelihoods(files["metrics.json"], current) if measured else (),
    }


def _one_line_per_step(lines: list[dict[str, float]]) -> tuple[dict[str, float], ...]:
    """The last line of each step, in order: a run that was restarted writes some steps twice."""
    by_step = {line["step"]: line for line in lines}
    return tuple(by_step[step] for step in sorted(by_step))


def _snapshots(folder: Path) -> tuple[Snapshot, ...]:
    paths = sorted(p for p in folder.glob("*.png") if p.stem.isdecimal())
    chosen = [paths[i] for i in evenly(len(paths), MOST_SNAPSHOTS)]
    return tuple(Snapshot(images_seen=int(p.stem), png=_picture(p)) for p in chosen)


def _picture(path: Path) -> bytes:
    """A snapshot's file, which the page shows as it is: a picture and nothing else."""
    content = read_bytes(path, limits.PICTURE_BYTES)
    try:
        decode(content)
    except BadPicture as finding:
        raise UserError(f"{path}: {finding}") from None
    return content


def read_measures(path: Path) -> tuple[Measure, ...]:
    """Entries of a metrics.json, by number of network calls. Raises UserError when it is none."""
    measures = [
        Measure(
            sampler=entry["sampler"] or {},
            nfe=entry["nfe"],
            seconds=float(entry.get("seconds") or 0),
            report=dict(entry["report"]),
            command=tuple(entry.get("command") or ()),
            weights_sha256=entry.get("weights_sha256"),
            classes=entry.get("classes"),
            peak_bytes=entry.get("peak_bytes") or None,
        )
        for entry in read_scores(path).get("reports", [])
    ]
    return tuple(sorted(measures, key=lambda m: m.nfe))


def read_likelihoods(path: Path, weights: str | None) -> tuple[Mapping[str, Any], ...]:
    """Bits per dimension of these weights in a metrics.json, lowest first. Raises UserError for what is no entry."""
    entries = [e for e in read_scores(path).get("likelihoods", []) if e.get("weights_sha256") in (None, weights)]
    return tuple(sorted(entries, key=lambda entry: entry["report"]["bpd"]))


# --- what the model draws -----------------------------------------------------------------------------------


def _draw(generator: ImageGenerator, seed: int, on_progress: OnProgress) -> dict[str, Any]:
    """Samples per class, the first images of the seed, and the way of some of them."""
    names = class_names(generator.spec)
    shown = evenly(len(names), MOST_CLASSES)
    labels = np.repeat(np.array(shown, dtype=np.int64), PER_CLASS) if names else None
    wanted = len(shown) * PER_CLASS if names else 4 * PER_CLASS
    total = wanted + PER_CLASS
    first = generator.labels(PER_CLASS, seed)
    images, trajectory = draw_trajectory(generator, PER_CLASS, labels=first, seed=seed)
    on_progress(PER_CLASS, total)
    drawn: list[Images] = []
    for batch in generator.batches(wanted, labels=labels, seed=seed, batch_size=2 * PER_CLASS):
        drawn.append(batch)
        on_progress(PER_CLASS + sum(map(len, drawn)), total)
    rows = np.concatenate(drawn).reshape(-1, PER_CLASS, *images.shape[1:])
    titles = [names[i] for i in shown] if names else [f"{i + 1}" for i in range(len(rows))]
    return {
        "classes": tuple(ClassRow(name=title, images=row) for title, row in zip(titles, rows, strict=True)),
        "first_images": images,
        "first_labels": () if first is None else tuple(names[i] for i in first),
        "trajectory": trajectory,
        "sampler_nfe": generator.nfe,
    }


def class_names(spec: DataSpec) -> tuple[str, ...]:
    """A name for every class, its number where the data set has none; () for a model without classes."""
    return spec.class_names or tuple(str(i) for i in range(spec.num_classes))


def draw_trajectory(
    generator: ImageGenerator,
    n: int,
    *,
    labels: npt.NDArray[np.int64] | None = None,
    seed: int = 0,
    first: int = 0,
) -> tuple[Images, Trajectory]:
    """Images first .. first + n - 1 of a seed, uint8 [n, H, W, C], and the way of the first few."""
    steps: list[tuple[Images, Images, float]] = []

    def note(x: Tensor, estimate: Tensor, sigma: float) -> None:
        rows = slice(0, TRAJECTORIES)
        steps.append((to_uint8(x[rows].float()), to_uint8(estimate[rows].float()), float(sigma)))

    images = generator.generate(n, labels=labels, seed=seed, first=first, batch_size=n, on_step=note)
    x, estimate, sigmas = zip(*steps, strict=True)
    tokens = kind_of(generator.model) == "token_model"
    return images, Trajectory(x=np.stack(x), estimate=np.stack(estimate), sigmas=tuple(sigmas), tokens=tokens)


# --- what the real images say -------------------------------------------------------------------------------


def _compare(
    samples: Images,
    spec: DataSpec,
    experiment: Mapping[str, Any],
    folder: Path,
    features: str | None,
    missing: dict[str, Missing],
) -> dict[str, Any]:
    """Neighbours among the training images, or why there are none."""
    if not experiment:
        missing["neighbours"] = Missing(reason="The training images are not known here, so none can be compared.")
        return {}
    try:
        config = experiment_from_json(experiment["experiment"].get("data"), folder / "experiment.json")
        if not isinstance(config, DataConfig):
            raise UserError("experiment.json does not say which")
        real = config.open()
        if real.spec.shape != spec.shape:
            raise UserError(
                f"{config.source} now holds images of shape {real.spec.shape}, the model's are {spec.shape}"
            )
    except UserError as error:
        missing["neighbours"] = Missing(
            reason=f"The training images cannot be opened ({error}). To try again:",
            command=("report", str(folder)),
        )
        return {}
    held_out = _held_out(config)
    if len(real) > MOST_REAL:
        real = real.subset(evenly(len(real), MOST_REAL))
    spaces: list[tuple[str, FeatureExtractor | None]] = [("pixel space", None)]
    encoder = features or OF_DATA.get(config.source)
    if encoder is not None:
        spaces.insert(0, ("feature space" if features is None else f"features of {features}", named_extractor(encoder)))
    found = tuple(_neighbours(name, extractor, samples, real, held_out) for name, extractor in spaces)
    return {"neighbours": found, "num_real": len(real)}


def _held_out(config: DataConfig) -> Images | None:
    """Real images that the run has not seen, where the set has such a split."""
    if config.split != "train" or config.source not in OF_DATA:
        return None
    real = open_images(config.source, resolution=config.resolution, split="test", labels=config.labels)
    return real.images(evenly(len(real), 100))


def _neighbours(
    space: str, extractor: FeatureExtractor | None, samples: Images, real: ImageSet, held_out: Images | None
) -> Neighbours:
    indices, distances = nearest(samples, real, extractor, k=min(NEIGHBOURS, len(real)))
    shown = slice(0, MOST_QUERIES)
    pictures = real.images(indices[shown].reshape(-1)).reshape(*indices[shown].shape, *samples.shape[1:])
    others = None if held_out is None else float(np.median(nearest(held_out, real, extractor, k=1)[1]))
    return Neighbours(
        space=space,
        real=pictures,
        indices=indices[shown],
        distances=distances[shown],
        typical=float(np.median(distances[:, 0])),
        held_out=others,
    )


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of 0 .. n - 1, evenly spread, first and last among them."""
    return list(range(n)) if n <= most else [round(i * (n - 1) / (most - 1)) for i in range(most)]
