"""What a metrics.json holds: scores, likelihoods, accuracies, reconstructions, retrievals, and what they depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from imagewright.files import read_formatted
from imagewright.shapes import Within

FORMAT = "imagewright-metrics/1"


class ReportRecord(TypedDict):
    """A `metrics.Report` as JSON, as far as it is read."""

    scores: dict[str, float]
    num_images: Annotated[int, Within(0)]
    num_reference: NotRequired[Annotated[int, Within(0)] | None]
    yardsticks: NotRequired[dict[str, dict[str, Any]]]
    settings: NotRequired[dict[str, Any]]
    notes: NotRequired[list[str]]


class ScoreRecord(TypedDict):
    """One measurement of a sampler."""

    sampler: dict[str, Any] | None
    nfe: Annotated[int, Within(0)]
    report: ReportRecord
    seconds: NotRequired[float | None]
    target: NotRequired[str]
    command: NotRequired[list[str] | None]
    classes: NotRequired[dict[str, Any] | None]
    weights_sha256: NotRequired[str | None]
    peak_bytes: NotRequired[Annotated[int, Within(0)] | None]


class BitsRecord(TypedDict):
    """A `metrics.bits.BitsReport` as JSON, as far as it is read."""

    bpd: float
    kind: str
    stderr: float | None
    num_images: Annotated[int, Within(0)]
    split: str
    preprocessing: str
    reference: str
    settings: dict[str, Any]
    notes: list[str]
    codecs: NotRequired[dict[str, float]]


class LikelihoodRecord(TypedDict):
    """One measurement of real images under a model."""

    report: BitsRecord
    changes: NotRequired[dict[str, Any]]
    target: NotRequired[str]
    weights_sha256: NotRequired[str | None]


class _Accuracy(TypedDict):
    top1: float
    top5: float | None
    num_images: Annotated[int, Within(0)]
    split: str
    reference: str
    probe: NotRequired[float]


class AccuracyRecord(TypedDict):
    """One measurement of a classifier on real images; its report is a `metrics.accuracy.Accuracy` as JSON."""

    report: _Accuracy
    language: NotRequired[str]
    target: NotRequired[str]
    weights_sha256: NotRequired[str | None]


class _Reconstruction(TypedDict):
    scores: dict[str, float]
    num_images: Annotated[int, Within(0)]
    seed: int
    latent: list[int]
    split: str
    reference: str
    extractor_sha256: str


class ReconstructionRecord(TypedDict):
    """One measurement of an autoencoder or tokenizer; its report is a `metrics.reconstruction.ReconstructionReport`."""

    report: _Reconstruction
    target: NotRequired[str]
    weights_sha256: NotRequired[str | None]


class _Retrieval(TypedDict):
    recall: dict[str, float]
    median_rank: float
    clips: Annotated[int, Within(0)]
    split: str
    reference: str


class RetrievalRecord(TypedDict):
    """One measurement of an encoder of videos and words; its report is a `metrics.retrieval.Retrieval` as JSON."""

    report: _Retrieval
    target: NotRequired[str]
    weights_sha256: NotRequired[str | None]


class Scores(TypedDict):
    """The whole file."""

    format: str
    reports: NotRequired[list[ScoreRecord]]
    likelihoods: NotRequired[list[LikelihoodRecord]]
    accuracies: NotRequired[list[AccuracyRecord]]
    reconstructions: NotRequired[list[ReconstructionRecord]]
    retrievals: NotRequired[list[RetrievalRecord]]


def read_scores(path: Path) -> Scores:
    """A metrics.json. Raises UserError when it is missing, damaged or of another format."""
    return read_formatted(path, FORMAT, Scores)
