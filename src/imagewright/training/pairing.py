"""The pairs that a run learns from: its data's kind, its own teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imagewright.data.couplings import Couplings, Mixture, mixed
from imagewright.training.given import Sources
from imagewright.types import DataSpec, UserError


def pairs_of(
    names: str | tuple[str, ...], weights: tuple[float, ...], spec: DataSpec, teacher: Any, sources: Sources
) -> Couplings | Mixture | None:
    """Those of one store, or of several by their weights, noted among the inputs; None where one is not there.

    Raises UserError where they are of other data, or of another teacher than the run's.
    """
    several = {"couplings": names} if isinstance(names, str) else {f"couplings.{i}": n for i, n in enumerate(names)}
    stores = {role: sources.couplings(name) for role, name in several.items()}
    there = {role: store for role, store in stores.items() if store is not None}
    for role, store in there.items():
        _check_pairs(store, spec)
        _check_pairs_teacher(store, teacher, sources.inputs.get("teacher"))
        sources.inputs[role] = store.identity
    if len(there) < len(stores):
        return None
    return mixed(list(there.values()), weights)


def _check_pairs(store: Couplings, spec: DataSpec) -> None:
    ours, theirs = ((s.resolution, s.channels, s.num_classes) for s in (spec, store.spec))
    if ours != theirs:
        raise UserError(
            f"couplings {store.folder} are of resolution, channels and classes {theirs}; the data have {ours}"
        )


def _check_pairs_teacher(store: Couplings, teacher: Any, known: Mapping[str, Any] | None) -> None:
    """Pairs are the run's teacher's own: weights are compared, wherever they lie. A stand-in's (None) are not known."""
    origin = store.manifest.origin
    if known is not None and origin.get("weights_sha256") != known["weights_sha256"]:
        raise UserError(
            f"couplings {store.folder} were drawn from {origin.get('model')}, whose weights are not those of the "
            f"teacher {teacher}; draw the teacher's own with: imagewright couple {teacher} --out FOLDER"
        )
