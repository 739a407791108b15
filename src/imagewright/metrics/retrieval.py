"""Finding videos by captions: how far up the right one stands among all (recall, median rank).

Departs  The released program (google-research, vatt/utils/eval) takes the mean of four windows of a video, at half as
         many frames a second as in training; here every window is a clip of its own, as it was learnt. Ties count
         against a caption (there by their order). Its probe is another: two linear layers, learnt by Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imagewright.data.clips import Clips, ClipSet
from imagewright.metrics.probe import probe_accuracy
from imagewright.types import UserError

RECALL = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Of captions that each look for their own video among `clips` videos, and of classifiers of the videos.

    recall: share of captions whose video is among the first 1, 5, 10. median_rank: 1 = first. by_class: share of the
    first videos that are of the caption's class, and of the first ten; None = there are no classes. probe: share of
    clips whose class a linear map of the pooled vector names, of the video and of the sound; None likewise.
    reference: fingerprint of the clips.
    """

    recall: dict[str, float]
    median_rank: float
    by_class: dict[str, float] | None
    probe: dict[str, float] | None
    clips: int
    reference: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def ranks(similarity: Tensor) -> Tensor:
    """Place of each row's own column in it, [N, N] -> int64 [N], 0 = the greatest; ties count against it."""
    own = similarity.diagonal()[:, None]
    return (similarity >= own).sum(1) - 1


def recalls(places: Tensor) -> dict[str, float]:
    """Shares of places below 1, 5 and 10."""
    return {f"r{k}": float((places < k).double().mean()) for k in RECALL}


def of_class(similarity: Tensor, labels: Tensor, first: int) -> float:
    """Share of each row's greatest columns that are of its class, [N, N] and [N]."""
    found = similarity.topk(min(first, similarity.shape[1]), dim=1).indices
    return float((labels[found] == labels[:, None]).double().mean())


def measure_retrieval(
    model: Any,
    clips: ClipSet,
    train: ClipSet | None = None,
    *,
    n: int | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int], None] = lambda done: None,
) -> Retrieval:
    """Of a `models.vatt.VATTEncoder`, which has not been taught to: zero-shot text-to-video retrieval, linear probes.

    clips: those that are searched, by the model's own words; those without text are left out. train: others, with
    classes, from which the probes learn; None = there are none. n: clips of either at most, evenly chosen. Raises
    UserError where nothing has a text.
    """
    model.eval().to(device)
    clips = replace(clips, vocabulary=model.words)
    queries = [(row, text) for row in chosen(clips, n) if (text := clips.origin.query(int(row))) is not None]
    if len(queries) < 2:
        raise UserError(f"{clips.source} has {len(queries)} clips with text; retrieval needs 2 or more")
    rows = np.array([row for row, _ in queries])
    words = torch.cat([clips.caption(text) for _, text in queries])
    pooled = _pooled(model, clips, rows, batch_size, device, on_progress)
    similarity = _compared(model, pooled, words, batch_size, device)
    places = ranks(similarity)
    labels = torch.from_numpy(clips.labels[rows])
    known = clips.spec.num_classes > 0
    by_class = {f"p{k}": of_class(similarity, labels, k) for k in (1, 10)} if known else None
    probe = None
    if known and train is not None:
        others = chosen(train, n)
        taught = _pooled(model, train, others, batch_size, device, on_progress)
        probe = {
            name: probe_accuracy(taught[name].numpy(), train.labels[others], pooled[name].numpy(), clips.labels[rows])
            for name in pooled
        }
    return Retrieval(
        recall=recalls(places),
        median_rank=float(np.median(places.numpy())) + 1,
        by_class=by_class,
        probe=probe,
        clips=len(rows),
        reference=clips.fingerprint,
    )


def chosen(clips: ClipSet, n: int | None) -> npt.NDArray[np.int64]:
    """All rows, or so many of them, evenly."""
    count = len(clips) if n is None else min(n, len(clips))
    return np.arange(count) * len(clips) // max(count, 1)


def _pooled(
    model: Any,
    clips: ClipSet,
    rows: npt.NDArray[np.int64],
    batch_size: int,
    device: torch.device | str,
    on_progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """What each backbone makes of clips, float32 on the CPU."""
    made: list[dict[str, Tensor]] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch: Clips = clips.at(part).map(lambda t: t.to(device))
        made.append({name: each.float().cpu() for name, each in model.pooled(batch).items()})
        on_progress(len(part))
    return {name: torch.cat([each[name] for each in made]) for name in made[0]}


def _compared(
    model: Any, pooled: dict[str, Tensor], words: Tensor, batch_size: int, device: torch.device | str
) -> Tensor:
    """Similarity of captions, int64 [M, L], to the videos, float32 [M, M] on the CPU."""
    coarse, asked = [], []
    for start in range(0, len(words), batch_size):
        part = slice(start, start + batch_size)
        joint = model.joined({name: each[part].to(device) for name, each in pooled.items()}, words[part].to(device))
        coarse.append(joint.video_to_text.float().cpu())
        asked.append(joint.text.float().cpu())
    return torch.cat(asked) @ torch.cat(coarse).T
