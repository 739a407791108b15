"""Sets of encoded pictures in parquet files, as the Hugging Face hub keeps them. Needs the extra `parquet` (pyarrow).

Source   the `datasets` library's layout: a column that holds {bytes, path} (or bytes) for each picture, a column of
         whole numbers with the class, names of classes in the schema's metadata under "huggingface"; splits are told
         by the files' names (train-00000-of-00004.parquet).
Nothing is executed: pyarrow from 14.0.1 on loads no extension types from a file (CVE-2023-47248), and older ones are
refused. A picture is a reference into its file; no more than a few row groups are in memory.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagewright import limits
from imagewright.data.annotations import SPLITS, Annotations
from imagewright.data.archive import Archive, few_folders
from imagewright.data.pixels import BadPicture
from imagewright.files import require_regular
from imagewright.types import UserError

LABELS = ("label", "labels", "fine_label", "class")
CAPTIONS = ("text", "caption", "prompt")
"""Names of columns, the first of which that is there counts."""
TABLE = ("picture", "caption", "language")
"""Columns of a table of captions, which may lie in the folder of its pictures (`data.caption_tables`)."""
_GROUPS = 4
_OLDEST = (14, 0, 1)


def parquet_files(path: Path) -> list[Path]:
    """The parquet files that a path is or holds, also one folder deeper, in order of their names."""
    if path.is_dir():
        return sorted(file for folder in (path, *few_folders(path)) for file in folder.glob("*.parquet"))
    return [path] if path.suffix == ".parquet" else []


def open_parquet(path: Path, *, labels: bool) -> tuple[Archive, Annotations] | None:
    """The pictures as an archive, and what is known of them; None where there are no parquet files.

    Raises UserError where pyarrow is missing, or a file is damaged or holds no pictures.
    """
    files = parquet_files(path)
    if not files:
        return None
    arrow = _pyarrow()
    if path.is_dir():
        files = [file for file in files if not _is_table(_opened(file, arrow).schema_arrow, arrow)]
        if not files:
            return None
    names: list[str] = []
    places: dict[str, tuple[Path, int, int]] = {}
    known = Annotations(labels={} if labels else None)
    for file in files:
        _index(file, arrow, path, places, names, known)
    if not known.labels:
        known.labels, known.num_classes, known.class_names = None, 0, ()
    elif not known.num_classes:
        known.num_classes = max(known.labels.values()) + 1
    reader = _Reader(places)
    archive = Archive(path=path, pictures=tuple(names), others=frozenset(), folders=frozenset(), bad=(), read=reader)
    return archive, known


def read_columns(file: Path, names: Sequence[str]) -> list[list[Any]]:
    """Whole columns of a file, in order. Raises UserError for a damaged file, or one without them."""
    arrow = _pyarrow()
    opened = _opened(file, arrow)
    absent = [name for name in names if name not in opened.schema_arrow.names]
    if absent:
        raise UserError(f"{file} has columns {', '.join(opened.schema_arrow.names[:10])}; it needs {', '.join(names)}")
    unpacked = sum(opened.metadata.row_group(i).total_byte_size for i in range(opened.num_row_groups))
    if unpacked > max(limits.UNPACKED, limits.RATIO * require_regular(file)):
        raise UserError(f"{file} would unpack to {unpacked} bytes")
    try:
        found = opened.read(columns=list(names))
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file} is no readable parquet file: {_short(error)}") from None
    return [found.column(name).to_pylist() for name in names]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need a package: pip install 'imagewright[parquet]'") from None
    if tuple(int(part) for part in pyarrow.__version__.split(".")[:3] if part.isdigit()) < _OLDEST:
        raise UserError(f"pyarrow {pyarrow.__version__} may execute what a file holds; 14.0.1 or newer is needed")
    return pyarrow


def _opened(file: Path, arrow: Any) -> Any:
    require_regular(file)
    try:
        return arrow.parquet.ParquetFile(file, thrift_string_size_limit=limits.RECORD, memory_map=True)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file} is no readable parquet file: {_short(error)}") from None


def _index(
    file: Path,
    arrow: Any,
    root: Path,
    places: dict[str, tuple[Path, int, int]],
    names: list[str],
    known: Annotations,
) -> None:
    """Note where each picture of a file is, and its class, caption and split."""
    opened = _opened(file, arrow)
    schema = opened.schema_arrow
    _image_column(file, schema, arrow)
    integers = [n for n in LABELS if n in schema.names and arrow.types.is_integer(schema.field(n).type)]
    texts = [n for n in CAPTIONS if n in schema.names and arrow.types.is_string(schema.field(n).type)]
    wanted = [*(integers[:1] if known.labels is not None else ()), *texts[:1]]
    if known.labels is not None and integers:
        found = _hub_names(schema, integers[0])
        known.class_names, known.num_classes = (found, len(found)) if found else (known.class_names, known.num_classes)
    split = SPLITS.get(file.stem.split("-")[0].lower()) or SPLITS.get(file.parent.name.lower())
    inside = file.relative_to(root).as_posix() if root.is_dir() else file.name
    for group in range(opened.num_row_groups):
        try:
            columns = opened.read_row_group(group, columns=wanted).to_pydict() if wanted else {}
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{file} is no readable parquet file: {_short(error)}") from None
        for row in range(opened.metadata.row_group(group).num_rows):
            name = f"{inside}:{group}:{row}"
            names.append(name)
            places[name] = (file, group, row)
            if split:
                known.texts["split"][name] = split
            if texts and isinstance(columns[texts[0]][row], str):
                known.texts["name"][name] = columns[texts[0]][row]
            if known.labels is not None and integers:
                label = columns[integers[0]][row]
                if label is None or not 0 <= label < limits.CLASSES:
                    known.bad.append((name, f"its class is {label}; it must be from 0 to {limits.CLASSES - 1}"))
                else:
                    known.labels[name] = label


def _is_table(schema: Any, arrow: Any) -> bool:
    """Whether it holds captions, and pictures' names in the place of pictures."""
    return {*TABLE} <= {*schema.names} and arrow.types.is_string(schema.field(TABLE[0]).type)


def _image_column(file: Path, schema: Any, arrow: Any) -> str:
    """The name of the column of pictures."""
    types = arrow.types
    for field in schema:
        kind = field.type
        if types.is_struct(kind) and any(kind.field(i).name == "bytes" for i in range(kind.num_fields)):
            return str(field.name)
    for field in schema:
        if types.is_binary(field.type) or types.is_large_binary(field.type):
            return str(field.name)
    raise UserError(f"{file} has columns {', '.join(schema.names[:10])}, none of which holds pictures (bytes)")


def _hub_names(schema: Any, column: str) -> tuple[str, ...]:
    """The classes' names as the `datasets` library writes them; () where there are none."""
    try:
        meta = json.loads((schema.metadata or {})[b"huggingface"])
        found = meta["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(found) if isinstance(found, list) and all(isinstance(n, str) for n in found) else ()


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


@dataclass
class _Reader:
    """The bytes of a picture by its name; the last row groups that were read stay. Other processes can be given it."""

    places: dict[str, tuple[Path, int, int]]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Path, int], Sequence[Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.places = state["places"]
        self.__post_init__()

    def __call__(self, name: str) -> bytes:
        file, group, row = self.places[name]
        with self._lock:
            rows = self._groups.pop((file, group), None)
            if rows is None:
                rows = self._read(file, group)
            self._groups[file, group] = rows
            while len(self._groups) > _GROUPS:
                self._groups.popitem(last=False)
        content = rows[row].as_py()
        if isinstance(content, dict):
            content = content.get("bytes")
        if not isinstance(content, bytes):
            raise BadPicture("holds no bytes: the picture lies elsewhere")
        if len(content) > limits.PICTURE_BYTES:
            raise BadPicture(f"larger than {limits.PICTURE_BYTES} bytes")
        return content

    def _read(self, file: Path, group: int) -> Sequence[Any]:
        arrow = _pyarrow()
        opened = _opened(file, arrow)
        size = opened.metadata.row_group(group).total_byte_size
        if size > max(limits.UNPACKED, limits.RATIO * require_regular(file)):
            raise BadPicture(f"its row group would unpack to {size} bytes")
        column = _image_column(file, opened.schema_arrow, arrow)
        try:
            chunks: Sequence[Any] = opened.read_row_group(group, columns=[column]).column(0)
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise BadPicture(f"cannot be read: {_short(error)}") from None
        return chunks
