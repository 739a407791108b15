"""Scores of generated images against real ones, in a report that carries everything the scores depend on.

Names      fd_<extractor> Frechet distance, kd_<extractor> kernel distance, is_<extractor> classifier score;
           with the official Inception weights, and only then, they are called fid, kid and is. Precision,
           recall, density and coverage keep their names (see `neighbours` for which way round they go).
Memory     the Frechet distance is streamed; logits are kept for the classifier score, features for the other two.
Chance     subsets, splits and yardsticks are drawn from one fixed seed, whatever the images' own: two seeds' scores
           differ by their images alone, and equal features and logits have torch-fidelity's KID and Inception score.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from imagewright.metrics.fd_infinity import SEED as FD_INFINITY_SEED
from imagewright.metrics.fd_infinity import fd_infinity
from imagewright.metrics.features import FeatureExtractor, Images, ImageSource
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.inception import WEIGHTS_SHA256
from imagewright.metrics.inception_score import SHUFFLE_SEED, SPLITS, inception_score
from imagewright.metrics.kernel import SEED, SUBSET_SIZE, SUBSETS, kernel_distance
from imagewright.metrics.neighbours import K_DENSITY_COVERAGE, K_PRECISION_RECALL, neighbourhood
from imagewright.metrics.reference import OnProgress, Reference, embed
from imagewright.metrics.statistics import FeatureStatistics, Moments, moments_of
from imagewright.metrics.yardsticks import Distance, Features, Yardstick, at_count, measure_yardsticks
from imagewright.types import UserError
from imagewright.version import versions

METRICS = ("fd", "kid", "is", "prdc")
OPTIONAL = ("fd_inf", "accuracy")
"""Measured where they are asked for."""
LEAST: Mapping[str, tuple[int, int]] = {
    "fd": (2, 2),
    "kid": (2, 2),
    "is": (1, 0),
    "fd_inf": (20, 2),
    "accuracy": (1, 0),
    "prdc": (K_PRECISION_RECALL + 1, K_DENSITY_COVERAGE + 1),
}
"""Images and real images that a metric needs: two for a covariance, more than k for a k-th neighbour."""
USUAL_FID_COUNT = 50_000
PRDC_MOST = 50_000
"""Of either set: time is quadratic, and these measures are published for no more."""
CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Report:
    """Scores and what they depend on. Two reports compare when all but scores, yardsticks and versions agree.

    scores:    by name; kid also with _std and _stderr over subsets, is with _std over splits.
    seed:      of the images; None = they have none.
    settings:  of each measure (subsets, k, splits, their seeds). notes: what to mind when quoting a score.
    """

    scores: Mapping[str, float]
    yardsticks: Mapping[str, Yardstick] = field(default_factory=dict)
    num_images: int
    image_shape: tuple[int, int, int]
    seed: int | None
    extractor: str
    extractor_sha256: str
    reference: str
    num_reference: int | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def feasible(metrics: Iterable[str], count: int, real: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The metrics that `count` images and `real` real ones allow, and of each other one why it is left out."""
    possible, reasons = [], []
    for metric in metrics:
        least, least_real = LEAST[metric]
        if count >= least and real >= least_real:
            possible.append(metric)
        else:
            needs = f"{least} images" + (f" and {least_real} real ones" if least_real else "")
            reasons.append(f"{metric} needs at least {needs}, and there are {count} and {real}")
    return tuple(possible), tuple(reasons)


def evaluate(
    images: Iterable[Images] | Images,
    reference: ImageSource | Reference | Moments,
    extractor: FeatureExtractor,
    *,
    metrics: Iterable[str] = METRICS,
    seed: int | None = None,
    labels: npt.NDArray[np.int64] | None = None,
    yardsticks: bool = True,
    on_progress: OnProgress | None = None,
) -> Report:
    """Compare generated with real images.

    images:     uint8 [n, H, W, C], or batches of such, of the reference's H, W and C.
    reference:  real images; or `Reference` (from `embed`) to embed them once for many evaluations; or
                `Moments` from a file, which allow "fd" and "is" only and no yardsticks.
    metrics:    of "fd", "kid", "is", "prdc", "fd_inf", "accuracy".   seed: that the images were drawn with.
    labels:     classes that were asked for, [n], of which "accuracy" is the share that the extractor sees.
    on_progress: called with the number of generated images seen.
    A metric that needs more images is left out, with a note. Raises UserError where all are.
    """
    wanted = _check_metrics(metrics, reference)
    if not isinstance(reference, Reference | Moments):
        reference = embed(reference, extractor)
    if isinstance(reference, Reference) and reference.extractor_sha256 != extractor.sha256:
        raise UserError("the reference was embedded with another feature extractor than the one given")
    wanted, without_classes = _known(wanted, labels, reference, extractor)
    seen = _look(images, reference, extractor, wanted, on_progress)
    if "accuracy" in wanted and labels is not None and len(labels) != seen.count:
        raise UserError(f"there are {len(labels)} labels for {seen.count} images")
    total = len(reference) if isinstance(reference, Reference) else reference.count or 2
    wanted, too_few = feasible(wanted, seen.count, total)
    left_out = (*too_few, *without_classes)
    if not wanted:
        raise UserError("; ".join(left_out))
    scores, settings = _scores(seen, reference, extractor, wanted)
    if "accuracy" in wanted and labels is not None:
        right = _class_probabilities(np.concatenate(seen.logits), extractor).argmax(1) == labels
        name = _label("accuracy", extractor)
        scores |= {name: float(right.mean()), f"{name}_stderr": float(right.std() / len(right) ** 0.5)}
    sticks: dict[str, Yardstick] = {}
    distances = {_label(m, extractor): _distance(m, settings) for m in ("fd", "kid") if m in wanted}
    if yardsticks and distances and isinstance(reference, Reference) and len(reference) >= 4:
        sticks = measure_yardsticks(reference, extractor, seen.count, distances, seed=SEED)
        settings["yardsticks"] = {"seed": SEED}
    return Report(
        scores=scores,
        yardsticks=sticks,
        num_images=seen.count,
        image_shape=seen.shape,
        seed=seed,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        reference=_fingerprint(reference),
        num_reference=len(reference) if isinstance(reference, Reference) else reference.count,
        settings=settings,
        notes=(
            *left_out,
            *([note] if (note := getattr(extractor, "note", "")) else []),
            *_notes(seen.count, extractor, wanted),
            *_prdc_note(settings, seen.count, total),
            *_floor_note(sticks, reference, _label("fd", extractor)),
        ),
        versions=versions(),
    )


# --- one pass over the images -------------------------------------------------------------------------------


@dataclass
class _Seen:
    statistics: FeatureStatistics
    features: list[Features]
    logits: list[Features]
    shape: tuple[int, int, int] = (0, 0, 0)

    @property
    def count(self) -> int:
        return self.statistics.count


def _look(
    images: Iterable[Images] | Images,
    reference: Reference | Moments,
    extractor: FeatureExtractor,
    wanted: tuple[str, ...],
    on_progress: OnProgress | None,
) -> _Seen:
    keep = not {"kid", "prdc", "fd_inf"}.isdisjoint(wanted)
    seen = _Seen(FeatureStatistics(extractor.dim), [], [])
    for batch in _batches(images):
        shape = (batch.shape[1], batch.shape[2], batch.shape[3])
        expected = reference.image_shape if isinstance(reference, Reference) else seen.shape if seen.count else shape
        if shape != expected:
            raise UserError(f"images are {list(shape)} (height, width, channels), expected {list(expected)}")
        features, logits = extractor(batch)
        seen.shape = shape
        seen.statistics.update(features)
        if keep:
            seen.features.append(features)
        if not {"is", "accuracy"}.isdisjoint(wanted):
            seen.logits.append(logits)
        if on_progress is not None:
            on_progress(seen.count)
    if not seen.count:
        raise UserError("there are no images to evaluate")
    return seen


def _batches(images: Iterable[Images] | Images) -> Iterator[Images]:
    if isinstance(images, np.ndarray):
        images = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    for batch in images:
        if batch.dtype != np.uint8 or batch.ndim != 4:
            raise UserError(f"images must be uint8 [n, H, W, C], got {batch.dtype} {list(batch.shape)}")
        if len(batch):
            yield batch


# --- scores -------------------------------------------------------------------------------------------------


def _scores(
    seen: _Seen,
    reference: Reference | Moments,
    extractor: FeatureExtractor,
    wanted: tuple[str, ...],
) -> tuple[dict[str, float], dict[str, Any]]:
    scores: dict[str, float] = {}
    settings: dict[str, Any] = {}
    features = np.concatenate(seen.features) if seen.features else np.empty((0, extractor.dim), dtype=np.float32)
    if "fd" in wanted:
        moments = reference.moments if isinstance(reference, Reference) else reference
        scores[_label("fd", extractor)] = frechet_distance(seen.statistics, moments)
    if "fd_inf" in wanted:
        line = fd_infinity(features, reference.moments if isinstance(reference, Reference) else reference)
        name = _label("fd", extractor).replace("fd_", "fd_inf_", 1).replace("fid", "fid_inf", 1)
        scores |= {name: line.value, f"{name}_stderr": line.stderr}
        settings["fd_inf"] = {"points": line.points, "smallest": line.smallest, "seed": FD_INFINITY_SEED}
    if "kid" in wanted and isinstance(reference, Reference):
        size = min(SUBSET_SIZE, seen.count, len(reference))
        kernel = kernel_distance(features, reference.features, subset_size=size)
        name = _label("kid", extractor)
        scores |= {name: kernel.value, f"{name}_std": kernel.std, f"{name}_stderr": kernel.stderr}
        settings["kid"] = {"subsets": SUBSETS, "subset_size": size, "seed": SEED}
    if "is" in wanted:
        score = inception_score(np.concatenate(seen.logits), splits=min(SPLITS, seen.count))
        name = _label("is", extractor)
        scores |= {name: score.value, f"{name}_std": score.std}
        settings["is"] = {"splits": score.splits, "seed": SHUFFLE_SEED}
    if "prdc" in wanted and isinstance(reference, Reference):
        some = _at_most(reference.features, PRDC_MOST), _at_most(features, PRDC_MOST)
        found = asdict(neighbourhood(*some))
        settings["prdc"] = {name: found.pop(name) for name in ("k_precision_recall", "k_density_coverage")}
        settings["prdc"] |= {"real": len(some[0]), "generated": len(some[1]), "seed": SEED}
        scores |= found
    return scores, settings


def _known(
    wanted: tuple[str, ...],
    labels: npt.NDArray[np.int64] | None,
    reference: Reference | Moments,
    extractor: FeatureExtractor,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The metrics whose classes the extractor knows, and why not the others. Raises UserError where none is left."""
    faults = {
        "is": "" if extractor.num_classes else f"is needs classes, and {extractor.name} has none",
        "accuracy": _no_accuracy(labels, reference, extractor) if "accuracy" in wanted else "",
    }
    possible = tuple(metric for metric in wanted if not faults.get(metric))
    why = tuple(faults[metric] for metric in wanted if metric not in possible)
    if not possible:
        raise UserError("; ".join(why))
    return possible, why


def _no_accuracy(
    labels: npt.NDArray[np.int64] | None, reference: Reference | Moments, extractor: FeatureExtractor
) -> str:
    """Why there is no share of images of the class that was asked for; nothing where there is."""
    if labels is None:
        return "accuracy needs images of classes that were asked for"
    known = _class_probabilities(np.zeros((1, extractor.num_classes), np.float32), extractor).shape[1]
    counts = (reference.moments if isinstance(reference, Reference) else reference).class_counts
    wanted = int(labels.max()) + 1 if counts is None else len(counts)
    return "" if known == wanted else f"accuracy needs the {wanted} classes, and {extractor.name} names {known}"


def _class_probabilities(logits: Features, extractor: FeatureExtractor) -> npt.NDArray[np.float64]:
    """Of the data's classes, [n, K]; of an extractor that names parts of these (`group_of`) the sums over the parts."""
    each: npt.NDArray[np.float64] = softmax(logits.astype(np.float64), axis=1) if logits.size else logits.astype(float)
    group_of = getattr(extractor, "group_of", None)
    return each if group_of is None else each @ np.eye(max(group_of) + 1)[np.asarray(group_of)]


def _at_most(features: Features, count: int) -> Features:
    """All features, or so many of them, drawn from a fixed seed, in order."""
    if len(features) <= count:
        return features
    rows = np.random.default_rng(SEED).choice(len(features), count, replace=False)
    return features[np.sort(rows)]


def _distance(metric: str, settings: Mapping[str, Any]) -> Distance:
    """The distance between two sets of features, for the yardsticks; subsets shrink to the smaller set."""
    if metric == "fd":
        return lambda a, b: frechet_distance(moments_of(a), moments_of(b))
    most = settings["kid"]["subset_size"]

    def kernel(a: Features, b: Features) -> float:
        size = min(most, len(a), len(b))
        subsets = 1 if size == len(a) == len(b) else SUBSETS  # subsets that are everything are all the same
        return kernel_distance(a, b, subsets=subsets, subset_size=size).value

    return kernel


def _label(metric: str, extractor: FeatureExtractor) -> str:
    if extractor.sha256 == WEIGHTS_SHA256:
        return {"fd": "fid"}.get(metric, metric)
    return f"{ {'kid': 'kd'}.get(metric, metric) }_{extractor.name}"


# --- what a score depends on --------------------------------------------------------------------------------


def _check_metrics(metrics: Iterable[str], reference: object) -> tuple[str, ...]:
    wanted = tuple(metrics)
    known = (*METRICS, *OPTIONAL)
    possible = ("fd", "is", *OPTIONAL) if isinstance(reference, Moments) else known
    for metric in wanted:
        if metric not in known:
            raise UserError(f"metrics has no {metric!r}; there are {', '.join(known)}")
        if metric not in possible:
            raise UserError(f"the metric {metric!r} needs the real images, and the reference holds only their moments")
    if not wanted:
        raise UserError(f"metrics is empty; there are {', '.join(METRICS)}")
    return wanted


def _fingerprint(reference: Reference | Moments) -> str:
    if isinstance(reference, Reference):
        return f"images:{reference.fingerprint}"
    return f"moments:{reference.provenance.get('fingerprint', 'unknown')}"


def _floor_note(sticks: Mapping[str, Yardstick], reference: Reference | Moments, label: str) -> tuple[str, ...]:
    if label not in sticks or not isinstance(reference, Reference):
        return ()
    stick, total = sticks[label], len(reference)
    return (
        f"real against real is {stick.floor_images} images against {stick.floor_images}; at {stick.num_images} against "
        f"{total} images as good as real would have a {label} of about {at_count(stick, total):.2g}",
    )


def _prdc_note(settings: Mapping[str, Any], count: int, real: int) -> tuple[str, ...]:
    told = settings.get("prdc", {"real": real, "generated": count})
    if (told["real"], told["generated"]) == (real, count):
        return ()
    return (
        f"precision, recall, density and coverage are of {told['generated']} of the {count} images and {told['real']} "
        f"of the {real} real ones, drawn at random: their time grows with the product",
    )


def _notes(count: int, extractor: FeatureExtractor, wanted: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    if "fd" in wanted and count <= extractor.dim:
        notes.append(
            f"{_label('fd', extractor)} of {count} images in {extractor.dim} dimensions has a rank-deficient "
            "covariance and is biased upwards; compare it only with scores of equally many images"
        )
    elif _label("fd", extractor) == "fid" and "fd" in wanted and count != USUAL_FID_COUNT:
        notes.append(f"fid is published for {USUAL_FID_COUNT} images; this one is of {count} and not comparable")
    if "is" in wanted and count < SPLITS * extractor.num_classes:
        notes.append(f"{_label('is', extractor)} of {count} images in {SPLITS} splits is biased downwards")
    return tuple(notes)
