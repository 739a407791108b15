"""Arrays from files: safetensors and npz, looked at before they are read. No pickle is ever opened.

What a file says of itself (names, shapes, number types) is read first and held against its real size, so that a claim
costs nothing; numbers that are not finite are refused at the door.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imagewright import limits
from imagewright.files import open_regular, parse_json
from imagewright.shapes import misfit
from imagewright.types import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number types of safetensors files that are read."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a safetensors file says of itself: each tensor's number type and shape, texts, and the file's size."""

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    texts: Mapping[str, str]
    size: int


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_head(path: Path) -> Head:
    """The header of a safetensors file, which is held against the file's size.

    Raises UserError naming the file when it is missing or damaged.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(limits.HEADER, size - 8):
            raise UserError(f"{path} is not a whole safetensors file: its header would have {length} bytes")
        content = file.read(length)
    where = f"{path} is not a whole safetensors file: its header"
    entries: dict[str, Any] = parse_json(content, where, dict)
    texts = entries.pop("__metadata__", {})
    fault = misfit(entries, dict[str, _Entry]) or misfit(texts, dict[str, str], "__metadata__")
    if fault is not None:
        raise UserError(f"{where} is damaged: {fault}")
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path} holds {name!r} as {entry['dtype']!r}; read are {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
            raise UserError(f"{path} is not a whole safetensors file: {name!r} would have shape {list(shape)}")
        tensors[name] = (dtype, shape)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size - 8 - length:
        raise UserError(f"{path} is not a whole safetensors file: it would have {8 + length + end} bytes, not {size}")
    return Head(tensors=tensors, texts=texts, size=size)


def read_tensors(path: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU; raises UserError naming the file when it is missing or damaged.

    finite: refuse a file with numbers that are not.
    """
    names = read_head(path).tensors
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None
    if finite:
        require_finite(path, state)
    return state


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file whose names begin so, by the rest of their names; each is read when asked for.

    Raises UserError naming the file when it is missing or damaged, and where a number is not finite.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        self._names = [name.removeprefix(prefix) for name in read_head(path).tensors if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.prefix + name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path} is not a whole safetensors file: {error}") from None
        require_finite(self.path, {name: tensor})
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def require_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the file and the tensor where a number is NaN or infinite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path} holds numbers that are not finite, in {name!r}")


def read_npz(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of those names that an npz of plain arrays has.

    Raises UserError naming the file where it is no such npz, or an array would be much larger than the file that holds
    it (`limits.UNPACKED`).
    """
    with open_regular(path) as file:
        return read_npz_file(path, file, names)


def read_npz_file(path: Path, file: BinaryIO, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """`read_npz` of an open file. path: for complaints."""
    try:
        size = file.seek(0, 2)
        with zipfile.ZipFile(file) as archive:
            there = {entry.filename: entry for entry in archive.infolist()}
            found = {}
            for name in names:
                if f"{name}.npy" in there:
                    found[name] = _read_array(path, archive, there[f"{name}.npy"], size)
            return found
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        raise UserError(f"{path} is no readable npz of plain arrays: {error}") from None
    except (NotImplementedError, RuntimeError) as error:  # another compression, a password
        raise UserError(f"{path} is no readable npz of plain arrays: {error}") from None


def array_names(path: Path) -> list[str]:
    """The names of an npz's arrays. Raises UserError where it is none."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no readable npz of plain arrays: {error}") from None


def _read_array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int) -> npt.NDArray[Any]:
    if entry.file_size > max(limits.UNPACKED, limits.RATIO * size):
        raise UserError(f"{path} would unpack to {entry.file_size} bytes, over {limits.RATIO} times its size")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"it has npy format {version}")
        shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python objects (a pickle), which are never opened")
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(f"{entry.filename} says it has shape {shape}, more than the file holds")
    with archive.open(entry) as stream:
        array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array
