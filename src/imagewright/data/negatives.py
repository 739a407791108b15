"""What a model drew, stored for those that learn to be better than it: images or tokens, and their classes, by row.

    manifest.json              what example i is: model, sampler, seed, images or tokens; sizes
    drawn-000000.safetensors   drawn [k, ...] and labels int64 [k] of examples 0 .. k - 1

Example i is a function of (manifest, i). A shard appears under its name whole or not at all; who draws goes on with the
first that is missing (`training.self_play`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imagewright import limits
from imagewright.arrays import read_head
from imagewright.files import read_formatted, replacing, write_json
from imagewright.shapes import Within
from imagewright.types import Condition, UserError

FORMAT = "imagewright-negatives/1"
OPEN_SHARDS = 64
What = Literal["images", "tokens"]
DTYPES: dict[What, torch.dtype] = {"images": torch.float32, "tokens": torch.int32}


class _ManifestRecord(TypedDict):
    format: str
    n: Annotated[int, Within(1, limits.PAIRS)]
    seed: int
    shard: Annotated[int, Within(1, limits.PAIRS)]
    what: str
    shape: list[Annotated[int, Within(1, limits.PAIRS)]]
    classes: Annotated[int, Within(0, limits.CLASSES)]
    origin: NotRequired[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class NegativesManifest:
    """What the examples of a store are, and how they lie in shards.

    shape: of one example: [C, H, W] of images, [length] of tokens. classes: 0 = none. origin: weights' checksum,
    sampler; JSON-able. Raises UserError out of range.
    """

    n: int
    seed: int
    shard: int
    what: What
    shape: tuple[int, ...]
    classes: int
    origin: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("n", "shard"):
            if getattr(self, name) < 1:
                raise UserError(f"negatives: {name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0 or self.what not in get_args(What):
            raise UserError(f"negatives: seed is {self.seed} and what is {self.what!r}; >= 0, and images or tokens")

    @property
    def shards(self) -> int:
        """Number of shards; all but the last hold `shard` examples."""
        return -(-self.n // self.shard)

    def rows(self, index: int) -> range:
        """The examples of a shard."""
        return range(index * self.shard, min((index + 1) * self.shard, self.n))


def begin(folder: Path, manifest: NegativesManifest) -> None:
    """Write the manifest, or check that the folder has the same. Raises UserError where it holds another's."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "manifest.json").exists():
        if json.dumps(asdict(read_manifest(folder))) != json.dumps(asdict(manifest)):
            raise UserError(f"{folder} holds what another model, sampler or seed drew; choose another folder")
        return
    write_json(folder / "manifest.json", {"format": FORMAT, **asdict(manifest)})


def read_manifest(folder: Path) -> NegativesManifest:
    """The manifest of a store. Raises UserError when it is missing or damaged."""
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} holds no negatives: it has no manifest.json")
    record: dict[str, Any] = {**read_formatted(folder / "manifest.json", FORMAT, _ManifestRecord)}
    values = {k: v for k, v in record.items() if k != "format"}
    return NegativesManifest(**values | {"shape": tuple(record["shape"]), "origin": record.get("origin", {})})


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard lies."""
    return folder / f"drawn-{index:06d}.safetensors"


def write_shard(folder: Path, manifest: NegativesManifest, index: int, drawn: Tensor, labels: Tensor) -> None:
    """Store a shard's examples [k, *shape] and labels [k], atomically."""
    tensors = {"drawn": drawn.to(DTYPES[manifest.what]).contiguous().cpu(), "labels": labels.long().cpu()}
    with replacing(shard_path(folder, index)) as aside:
        save_file(tensors, aside)


def whole(folder: Path, manifest: NegativesManifest, index: int) -> bool:
    """Whether a shard is there, of its size and type."""
    path, count = shard_path(folder, index), len(manifest.rows(index))
    if not path.exists():
        return False
    wanted = {"drawn": (DTYPES[manifest.what], (count, *manifest.shape)), "labels": (torch.int64, (count,))}
    return read_head(path).tensors == wanted


class Negatives:
    """A complete store, read by row. Raises UserError naming a shard that is missing or of another size."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for index in range(self.manifest.shards):
            if not whole(self.folder, self.manifest, index):
                raise UserError(f"{shard_path(self.folder, index)} is missing, or not of its size; draw it again")
        self._file = lru_cache(maxsize=OPEN_SHARDS)(self._opened)

    @classmethod
    def open(cls, name: str) -> Negatives:
        """As a run names them: `--negatives FOLDER`."""
        return cls(name)

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's record says of what it was given."""
        m = self.manifest
        return {"examples": m.n, "seed": m.seed, "what": m.what, "weights_sha256": m.origin.get("weights_sha256")}

    def __len__(self) -> int:
        return self.manifest.n

    def read(self, rows: Tensor) -> tuple[Tensor, Condition]:
        """Examples by index [N], on its device: images float32 or tokens int64, and labels where there are classes.

        Raises UserError for labels that are none of the classes.
        """
        drawn, labels = [], []
        for i in rows.tolist():
            shard, row = divmod(i, self.manifest.shard)
            file = self._file(shard)
            drawn.append(file.get_slice("drawn")[row : row + 1])
            labels.append(file.get_slice("labels")[row : row + 1])
        label = torch.cat(labels)
        if self.manifest.classes and not (int(label.min()) >= -1 and int(label.max()) < self.manifest.classes):
            raise UserError(f"{self.folder} has labels that are none of the {self.manifest.classes} classes")
        examples = torch.cat(drawn).to(rows.device)
        examples = examples.long() if self.manifest.what == "tokens" else examples
        return examples, Condition(label=label.to(rows.device) if self.manifest.classes else None)

    def _opened(self, shard: int) -> Any:
        """A shard, memory-mapped; it is closed when it falls out of the cache."""
        return safe_open(shard_path(self.folder, shard), framework="pt").__enter__()  # type: ignore[no-untyped-call]
