"""Stores of tensors in shards, which can be read by row and made again one by one: of couplings, and of latents.

    manifest.json              what row i is, and how rows lie in shards
    shard-000000.safetensors   rows 0 .. shard - 1: the manifest's tensors, labels int64 [k]; checksum in the head

A shard appears under its name whole or not at all, and holds nothing but its own rows, so that any number of writers
may fill one folder, and dying at any moment loses at most the shard that is being made and the one that is being
written. The number of rows only grows: a writer that was asked for fewer makes the last of its shards as long as the
manifest has it by then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, ClassVar, NotRequired, Self, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagewright import limits
from imagewright.arrays import read_head, read_tensors
from imagewright.files import parse_json, read_formatted, replacing, write_json
from imagewright.locks import alone
from imagewright.shapes import Within
from imagewright.types import DataSpec, UserError

OPEN_SHARDS = 64
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class SpecRecord(TypedDict):
    """A `DataSpec` as JSON, with all of its classes."""

    name: str
    resolution: Annotated[int, Within(1, limits.SIDE)]
    channels: Annotated[int, Within(1, limits.SIDE)]
    num_classes: Annotated[int, Within(0, limits.CLASSES)]
    class_names: list[str]
    empty_classes: NotRequired[list[int]]


class SheetRecord(TypedDict):
    """What every store's manifest.json holds."""

    format: str
    n: Annotated[int, Within(1, limits.PAIRS)]
    seed: int
    shard: Annotated[int, Within(1, limits.PAIRS)]
    batch: int
    dtype: str
    spec: SpecRecord
    origin: dict[str, Any]


class _ShardHead(TypedDict):
    first: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The base of manifests: what the rows of a store are, and how they lie in shards.

    batch: rows per network call; it belongs to the row, as the last bits of an answer depend on it. dtype: of the
    stored numbers. origin: of what they were made, JSON-able. Raises UserError out of range.
    """

    n: int
    seed: int
    shard: int
    batch: int
    dtype: str
    spec: DataSpec
    origin: dict[str, Any]

    what: ClassVar[str]
    """Of rows, in words."""
    one: ClassVar[str]
    """The same of a single row."""
    format: ClassVar[str]
    record: ClassVar[Any]
    """Type of its JSON."""
    maker: ClassVar[str]
    """The command that makes such a store."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Fields that are not written where they are empty."""
    where: ClassVar[tuple[str, ...]] = ()
    """Entries of the origin that say where weights lay; which they are, their checksums say."""

    def __post_init__(self) -> None:
        for name in ("n", "shard", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{self.what}: {name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise UserError(f"{self.what}: seed is {self.seed}; it must be >= 0")
        if self.dtype not in DTYPES:
            raise UserError(f"{self.what}: dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")

    @property
    def shards(self) -> int:
        """Number of shards; all but the last hold `shard` rows."""
        return -(-self.n // self.shard)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """What a shard holds beside labels, and the shape of a row's share of it; all of the stored number type."""
        raise NotImplementedError

    def rows(self, index: int) -> range:
        """The rows of a shard."""
        return range(index * self.shard, min((index + 1) * self.shard, self.n))

    def write(self, folder: Path) -> None:
        """Write manifest.json."""
        plain = {k: v for k, v in asdict(self).items() if v or k not in self.optional}
        write_json(folder / "manifest.json", {"format": self.format, **plain})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a store. Raises UserError when it is missing or damaged."""
        path = folder / "manifest.json"
        if not path.exists():
            raise UserError(f"{folder} holds no {cls.what}: it has no manifest.json; `{cls.maker}` writes one")
        value: dict[str, Any] = {**read_formatted(path, cls.format, cls.record)}
        try:
            spec: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["spec"].items()}
            return cls(**{k: v for k, v in value.items() if k != "format"} | {"spec": DataSpec(**spec)})
        except (TypeError, UserError) as error:
            raise UserError(f"{path} is damaged: {error}") from None

    def comparable(self) -> dict[str, Any]:
        """All that a row depends on, as JSON has it."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        plain.pop("n")
        plain["origin"] = {k: v for k, v in plain["origin"].items() if k not in self.where}
        return plain


def claim_folder(folder: Path, manifest: Sheet) -> None:
    """Write the manifest, or check that the folder holds the same rows; n may grow.

    One writer at a time, or the smaller n could be written last. Raises UserError naming what differs.
    """
    what = manifest.what
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; {what} need a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".manifest.lock", wait=True):
        if (folder / "manifest.json").exists():
            before = manifest.read(folder)
            changed = [k for k, ours in manifest.comparable().items() if ours != before.comparable()[k]]
            if changed:
                raise UserError(f"{folder} holds {what} with another {', '.join(changed)}; choose another --out")
            if manifest.n < before.n:
                raise UserError(f"{folder} holds {before.n} {what}; --n is {manifest.n} and must be no less")
            if manifest.n == before.n:
                return
        manifest.write(folder)


def standing(folder: Path, manifest: Sheet) -> Any:
    """The manifest as it is by now, which another writer may have given more rows; never with fewer than `manifest`.

    Where the system has no locks, it may have been written over with fewer: it is put right.
    """
    now = manifest.read(folder)
    if now.n >= manifest.n:
        return now
    manifest.write(folder)
    return manifest


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{index:06d}.safetensors"


def lock_path(folder: Path, index: int) -> Path:
    """The lock of whoever makes a shard."""
    return folder / f".shard-{index:06d}.lock"


def write_rows(folder: Path, manifest: Sheet, index: int, labels: Tensor, floats: Mapping[str, Tensor]) -> None:
    """Store a shard's labels [k] and what the manifest says, atomically, with a checksum."""
    tensors = {name: floats[name].to(DTYPES[manifest.dtype]).contiguous() for name in manifest.tensors}
    tensors["labels"] = labels.long()
    with replacing(shard_path(folder, index)) as aside:
        head = {"first": manifest.rows(index).start, "sha256": _checksum(tensors)}
        # One entry: several have no fixed order.
        save_file(tensors, aside, metadata={manifest.what: json.dumps(head)})


def shard_fault(folder: Path, manifest: Sheet, index: int, *, checksum: bool = False) -> str | None:
    """What is wrong with a shard, in words; None = nothing. checksum: read all of it, else its head and size alone."""
    path, rows = shard_path(folder, index), manifest.rows(index)
    if not path.exists():
        return "is missing"
    try:
        found = read_head(path)
        head = parse_json(found.texts[manifest.what], "its head", _ShardHead)
        for name, one in manifest.tensors.items():
            dtype, shape = found.tensors[name]
            if shape != (len(rows), *one) or head["first"] != rows.start:
                where = f"from {manifest.one} {head['first']}, not {len(rows)} from {rows.start}"
                return f"holds {name} {list(shape)} {where}"
            if dtype != DTYPES[manifest.dtype] or found.tensors["labels"] != (torch.int64, (len(rows),)):
                return f"holds {name} as {dtype}, not {manifest.dtype}, or labels that are not one for each"
        return _content_fault(read_tensors(path), head, manifest) if checksum else None
    except (UserError, KeyError) as error:
        return f"is not whole ({error})"


def _content_fault(tensors: dict[str, Tensor], head: _ShardHead, manifest: Sheet) -> str | None:
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


class Rows:
    """A complete store, read by row: nothing is in memory but what was asked for.

    Raises UserError naming the shard when one is missing or not whole. A shard's contents are held against its checksum
    when it is first read from. check: is asked about a shard, by its path and as it is opened, at that time too.
    """

    def __init__(self, folder: Path, manifest: Sheet, check: Callable[[Path, Any], None] | None = None) -> None:
        self.folder, self.manifest, self._check = folder, manifest, check
        self._verified: set[int] = set()
        for index in range(manifest.shards):
            self._require_whole(index)
        self._file = lru_cache(maxsize=OPEN_SHARDS)(self._opened)

    def _require_whole(self, index: int, *, checksum: bool = False) -> None:
        fault = shard_fault(self.folder, self.manifest, index, checksum=checksum)
        if fault:
            raise UserError(
                f"{shard_path(self.folder, index)} {fault}; the command that made the {self.manifest.what}, given "
                "again, makes what is missing"
            )

    def read(self, indices: Sequence[int], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Rows by index, in that order: tensors as float32, and labels int64. names: of tensors; None = all.

        Raises IndexError out of range.
        """
        if not all(0 <= i < self.manifest.n for i in indices):
            raise IndexError(f"{self.manifest.one}s are 0 .. {self.manifest.n - 1}")
        shapes = {k: v for k, v in self.manifest.tensors.items() if names is None or k in names}
        found = {name: torch.empty(len(indices), *shape) for name, shape in shapes.items()}
        labels = torch.empty(len(indices), dtype=torch.int64)
        for place, i in enumerate(indices):
            shard, row = divmod(i, self.manifest.shard)
            file = self._file(shard)
            for name, tensor in found.items():
                tensor[place] = file.get_slice(name)[row : row + 1][0]
            labels[place] = file.get_slice("labels")[row : row + 1][0]
        return {**found, "labels": labels}

    def whole(self, index: int) -> dict[str, Tensor]:
        """All of a shard, as it is stored."""
        self._file(index)  # which checks it
        return read_tensors(shard_path(self.folder, index))

    def _opened(self, shard: int) -> Any:
        """A shard, memory-mapped; it is closed when it falls out of the cache."""
        path, fresh = shard_path(self.folder, shard), shard not in self._verified
        if fresh:
            self._require_whole(shard, checksum=True)
        file = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        if fresh and self._check is not None:
            self._check(path, file)
        self._verified.add(shard)
        return file


# --- filling a store ------------------------------------------------------------------------------------------------


Make = Callable[[Any, int], Callable[[], None]]
"""(manifest as it stands, shard) -> what writes that shard, which is made by then; it runs in another thread."""


def fill_shards(
    folder: Path,
    manifest: Sheet,
    make: Make,
    *,
    verify: bool = False,
    say: Callable[[str], None] = lambda text: None,
    advance_to: Callable[[int], None] = lambda rows: None,
) -> int:
    """Make every shard of a claimed folder that has a fault; returns how many were made here.

    Any number of processes share the work. verify: read all of every shard.
    """
    made, done, waiting = 0, 0, list(range(manifest.shards))
    with _Behind() as behind:
        while waiting:
            busy = []
            for index in waiting:
                with ExitStack() as held:
                    if held.enter_context(alone(lock_path(folder, index))) == "busy":
                        busy.append(index)
                        continue
                    now = standing(folder, manifest)
                    fault = shard_fault(folder, now, index, checksum=verify)
                    if fault:
                        if shard_path(folder, index).exists():
                            say(f"{shard_path(folder, index)} {fault}; it is made anew")
                        behind.do(make(now, index), held.pop_all())
                        made += 1
                done += len(manifest.rows(index))
                advance_to(done)
            if busy == waiting:  # others are at all that is left: wait for the first
                behind.finish()
                with alone(lock_path(folder, busy[0]), wait=True):
                    pass
            waiting = busy
    return made


class _Behind:
    """Writes a shard while the next is made; one waits at most. A shard's lock is let go of when it is written."""

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1)
        self._writing: tuple[Future[None], ExitStack] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        with self._thread:
            self.finish()

    def do(self, write: Callable[[], None], held: ExitStack) -> None:
        """Begin to write when the one before is written. held: closed afterwards, by the caller's thread."""
        with ExitStack() as unless_begun:
            unless_begun.push(held)
            self.finish()
            self._writing = self._thread.submit(write), unless_begun.pop_all()

    def finish(self) -> None:
        """Wait until all is written. Raises what writing raised."""
        if self._writing:
            (writing, held), self._writing = self._writing, None
            with held:
                writing.result()
