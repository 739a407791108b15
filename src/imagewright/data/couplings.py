"""Couplings on disk: what a teacher makes of noise, in shards that can be read by row and made again one by one.

    manifest.json              what pair i is: model, sampler, seed, data specification, number type; sizes
    shard-000000.safetensors   images [k, C, H, W] and labels int64 [k] of pairs 0 .. k - 1; checksum in the head;
                               of images that were inverted latents [k, C, H, W] too; where asked for, points
                               [k, T, C, H, W] of the trajectories

Pair i is a function of (manifest, i). Its noise is not stored: it is `ImageNoise(seed, [i])`'s first normal numbers, as
for every image that this library draws, and is drawn again when the pair is read. That halves the store. The noise of
a real image is what the teacher's flow makes of it, and is stored.
A shard appears under its name whole or not at all, and holds nothing but its own pairs, so that any number of writers
may fill one folder, and dying at any moment loses at most the shard that is being drawn and the one that is being
written. The number of pairs only grows: a writer that was asked for fewer makes the last of its shards as long as the
manifest has it by then.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagewright import limits
from imagewright.arrays import read_head, read_tensors
from imagewright.files import parse_json, read_formatted, replacing, write_json
from imagewright.locks import alone
from imagewright.noise import ImageNoise
from imagewright.shapes import Within
from imagewright.types import Chance, Condition, Coupling, DataSpec, Example, UserError

FORMAT = "imagewright-couplings/1"
OPEN_SHARDS = 64
WHERE = ("model", "guide")
"""Entries of the origin that say where weights lay; which they are, their checksums say."""
MOST_DEVIATION = 3.0
"""Of a shard's stored latents: more than an imperfect inversion leaves, far less than other conventions have."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class _ShardHead(TypedDict):
    first: int
    sha256: str


class _SpecRecord(TypedDict):
    name: str
    resolution: Annotated[int, Within(1, limits.SIDE)]
    channels: Annotated[int, Within(1, limits.SIDE)]
    num_classes: Annotated[int, Within(0, limits.CLASSES)]
    class_names: list[str]
    empty_classes: NotRequired[list[int]]


class _ManifestRecord(TypedDict):
    format: str
    n: Annotated[int, Within(1, limits.PAIRS)]
    seed: int
    shard: Annotated[int, Within(1, limits.PAIRS)]
    batch: int
    dtype: str
    spec: _SpecRecord
    origin: dict[str, Any]
    inverted: NotRequired[bool]
    times: NotRequired[list[float]]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the pairs of a store are, and how they lie in shards.

    origin: model, weights' checksum, sampler, network calls: JSON-able. batch: images per network call; it belongs to
    the pair, as the last bits of an answer depend on it. dtype: of the stored images. inverted: the images are real
    and the latents stored. times: of the straight path, at which points of the trajectories are stored, decreasing.
    Raises UserError out of range.
    """

    n: int
    seed: int
    shard: int
    batch: int
    dtype: str
    spec: DataSpec
    origin: dict[str, Any]
    inverted: bool = False
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        check_times(self.times)
        for name in ("n", "shard", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"couplings: {name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise UserError(f"couplings: seed is {self.seed}; it must be >= 0")
        if self.dtype not in DTYPES:
            raise UserError(f"couplings: dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")

    @property
    def shards(self) -> int:
        """Number of shards; all but the last hold `shard` pairs."""
        return -(-self.n // self.shard)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """What a shard holds beside labels, and the shape of a pair's share of it; all of the stored number type."""
        shape = self.spec.shape
        latents = {"latents": shape} if self.inverted else {}
        points = {"points": (len(self.times), *shape)} if self.times else {}
        return {"images": shape, **latents, **points}

    def rows(self, index: int) -> range:
        """The pairs of a shard."""
        return range(index * self.shard, min((index + 1) * self.shard, self.n))


def check_times(times: Sequence[float]) -> None:
    """Raise UserError unless times of the straight path lie between 0 and 1 and decrease; none will do."""
    if not all(0 < t < 1 for t in times) or list(times) != sorted(set(times), reverse=True):
        raise UserError(f"times is {tuple(times)}; they must lie between 0 and 1, and decrease")


def claim_folder(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or check that the folder holds the same couplings; n may grow.

    One writer at a time, or the smaller n could be written last. Raises UserError naming what differs.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; couplings need a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".manifest.lock", wait=True):
        if (folder / "manifest.json").exists():
            before = read_manifest(folder)
            changed = [k for k, ours in _comparable(manifest).items() if ours != _comparable(before)[k]]
            if changed:
                raise UserError(f"{folder} holds couplings with another {', '.join(changed)}; choose another --out")
            if manifest.n < before.n:
                raise UserError(f"{folder} holds {before.n} couplings; --n is {manifest.n} and must be no less")
            if manifest.n == before.n:
                return
        _write_manifest(folder, manifest)


def standing(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest as it is by now, which another writer may have given more pairs; never with fewer than `manifest`.

    Where the system has no locks, it may have been written over with fewer: it is put right.
    """
    now = read_manifest(folder)
    if now.n >= manifest.n:
        return now
    _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    plain = {k: v for k, v in asdict(manifest).items() if v or k not in ("inverted", "times")}
    write_json(folder / "manifest.json", {"format": FORMAT, **plain})


def _comparable(manifest: Manifest) -> dict[str, Any]:
    """All that a pair depends on, as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(manifest)))
    plain.pop("n")
    plain["origin"] = {k: v for k, v in plain["origin"].items() if k not in WHERE}
    return plain


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises UserError when it is missing or damaged."""
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} holds no couplings: it has no manifest.json; `imagewright couple` writes one")
    value: dict[str, Any] = {**read_formatted(path, FORMAT, _ManifestRecord)}
    try:
        spec: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["spec"].items()}
        return Manifest(**{k: v for k, v in value.items() if k != "format"} | {"spec": DataSpec(**spec)})
    except (TypeError, UserError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{index:06d}.safetensors"


def write_shard(folder: Path, manifest: Manifest, index: int, images: Tensor, labels: Tensor, **more: Tensor) -> None:
    """Store a shard's images [k, C, H, W], labels [k] and what else the manifest says, atomically, with a checksum."""
    floats = {"images": images, **more}
    tensors = {name: floats[name].to(DTYPES[manifest.dtype]).contiguous() for name in manifest.tensors}
    tensors["labels"] = labels.long()
    with replacing(shard_path(folder, index)) as aside:
        head = {"first": manifest.rows(index).start, "sha256": _checksum(tensors)}
        save_file(tensors, aside, metadata={"couplings": json.dumps(head)})  # one entry: several have no fixed order


def shard_fault(folder: Path, manifest: Manifest, index: int, *, checksum: bool = False) -> str | None:
    """What is wrong with a shard, in words; None = nothing. checksum: read all of it, else its head and size alone."""
    path, rows = shard_path(folder, index), manifest.rows(index)
    if not path.exists():
        return "is missing"
    try:
        found = read_head(path)
        head = parse_json(found.texts["couplings"], "its head", _ShardHead)
        for name, one in manifest.tensors.items():
            dtype, shape = found.tensors[name]
            if shape != (len(rows), *one) or head["first"] != rows.start:
                return f"holds {name} {list(shape)} from pair {head['first']}, not {len(rows)} from {rows.start}"
            if dtype != DTYPES[manifest.dtype] or found.tensors["labels"] != (torch.int64, (len(rows),)):
                return f"holds {name} as {dtype}, not {manifest.dtype}, or labels that are not one for each"
        return _content_fault(read_tensors(path), head, manifest) if checksum else None
    except (UserError, KeyError) as error:
        return f"is not whole ({error})"


def _content_fault(tensors: dict[str, Tensor], head: _ShardHead, manifest: Manifest) -> str | None:
    if _checksum({k: tensors[k] for k in (*manifest.tensors, "labels")}) != head["sha256"]:
        return "does not have the checksum that it was written with"
    labels, classes = tensors["labels"], manifest.spec.num_classes
    if classes and not (int(labels.min()) >= -1 and int(labels.max()) < classes):
        return f"has labels that are none of the {classes} classes"
    return None


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Couplings:
    """A complete store, read by row: nothing is in memory but what was asked for.

    Raises UserError naming the shard when one is missing or not whole. A shard's contents are held against its checksum
    when it is first read from.
    """

    example: ClassVar[type[Example]] = Coupling
    in_memory: ClassVar[bool] = False

    def __init__(self, folder: Path | str) -> None:
        self.folder, self.xflip = Path(folder), False
        self.manifest = read_manifest(self.folder)
        self._verified: set[int] = set()
        for index in range(self.manifest.shards):
            self._require_whole(index)
        self._file = lru_cache(maxsize=OPEN_SHARDS)(self._opened)

    def _require_whole(self, index: int, *, checksum: bool = False) -> None:
        fault = shard_fault(self.folder, self.manifest, index, checksum=checksum)
        if fault:
            raise UserError(
                f"{shard_path(self.folder, index)} {fault}; the command that made the couplings, given again, "
                "makes what is missing"
            )

    def __len__(self) -> int:
        return self.manifest.n

    @property
    def spec(self) -> DataSpec:
        """Shape and classes of the images."""
        return self.manifest.spec

    @property
    def source(self) -> str:
        """Where the pairs lie."""
        return str(self.folder)

    @property
    def fingerprint(self) -> str:
        """What identifies the pairs: how many, of which seed and which weights."""
        return sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of the pairs that it was given."""
        m = self.manifest
        found = {"pairs": m.n, "seed": m.seed, "weights_sha256": m.origin.get("weights_sha256")}
        inverted = m.origin.get("inverted") if m.inverted else None
        return found if inverted is None else {**found, "inverted": inverted}

    def mirrored(self) -> Couplings:
        """The store whose batches mirror half of the pairs left to right: noise, image and points together."""
        changed = copy.copy(self)
        changed.xflip = True
        return changed

    def batch(self, read: Coupling, rows: npt.NDArray[np.int64], chance: Chance) -> Coupling:
        """The pairs, half of them mirrored where that is asked for."""
        if not self.xflip:
            return read
        flips = torch.from_numpy(chance() < 0.5)
        for tensor in (read.latents, read.images, read.points):
            if tensor is not None:
                tensor[flips] = tensor[flips].flip(-1)
        return read

    def prepared(self, batch: Coupling) -> Coupling:
        """The pairs."""
        return batch

    def read(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Coupling:
        """Pairs by index, in that order: float32. Labels only where the model has classes."""
        indices = [int(i) for i in rows]
        if not all(0 <= i < len(self) for i in indices):
            raise IndexError(f"pairs are 0 .. {len(self) - 1}")
        found = {name: torch.empty(len(indices), *shape) for name, shape in self.manifest.tensors.items()}
        labels = torch.empty(len(indices), dtype=torch.int64)
        for place, i in enumerate(indices):
            shard, row = divmod(i, self.manifest.shard)
            file = self._file(shard)
            for name, tensor in found.items():
                tensor[place] = file.get_slice(name)[row : row + 1][0]
            labels[place] = file.get_slice("labels")[row : row + 1][0]
        latents = found.get("latents")
        if latents is None:
            latents = ImageNoise(self.manifest.seed, indices).normal(found["images"])
        cond = Condition(label=labels) if self.spec.num_classes else Condition()
        times = torch.tensor(self.manifest.times).expand(len(indices), -1) if self.manifest.times else None
        return Coupling(latents, found["images"], cond, found.get("points"), times)

    def _opened(self, shard: int) -> Any:
        """A shard, memory-mapped; it is closed when it falls out of the cache."""
        path = shard_path(self.folder, shard)
        fresh = shard not in self._verified
        if fresh:
            self._require_whole(shard, checksum=True)
        file = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        if fresh and self.manifest.inverted:
            _require_unit(path, file.get_tensor("latents"))
        self._verified.add(shard)
        return file


def _require_unit(path: Path, latents: Tensor) -> None:
    """Raise UserError where stored latents are of another noise convention, as EDM's, scaled by its largest level."""
    deviation = float(latents.float().std(correction=0))
    if not deviation <= MOST_DEVIATION:
        raise UserError(
            f"{path} holds latents of deviation {deviation:.3g}; noise here has 1 at every place, whatever its level"
        )


@dataclass(frozen=True)
class Mixture:
    """Several stores, of which a share of the pairs of every batch is drawn each. weights: positive; their sum is 1."""

    stores: tuple[Couplings, ...]
    weights: tuple[float, ...]


def mixed(stores: Sequence[Couplings], weights: Sequence[float]) -> Couplings | Mixture:
    """One store, or a mixture; without weights every store counts by its number of pairs.

    Raises UserError where weights and stores do not match, or pairs of the stores are not of one kind.
    """
    if weights and len(weights) != len(stores):
        raise UserError(
            f"data.coupling_weights has {len(weights)} numbers for {len(stores)} stores of pairs; give one for each"
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"data.coupling_weights is {tuple(weights)}; weights must be positive and finite")
    if len(stores) == 1:
        return stores[0]
    first = stores[0]
    for other in stores[1:]:
        for what, ours, theirs in (
            ("shape and number of classes", _kind(first.spec), _kind(other.spec)),
            ("times", first.manifest.times, other.manifest.times),
        ):
            if ours != theirs:
                raise UserError(
                    f"couplings {first.folder} and {other.folder} do not mix: their {what} are {ours} and {theirs}"
                )
    counts = list(weights) if weights else [float(len(store)) for store in stores]
    return Mixture(tuple(stores), tuple(count / sum(counts) for count in counts))


def _kind(spec: DataSpec) -> tuple[int, ...]:
    return (*spec.shape, spec.num_classes)
