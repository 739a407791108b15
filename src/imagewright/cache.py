"""Where things are kept that can be made again: $IMAGEWRIGHT_CACHE, else imagewright/ in the user's cache folder.

Nothing depends on it: where it cannot be made or written, the work is done anew each time. It may be deleted at any
time.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save_file

from imagewright.arrays import Head, read_head, read_tensors
from imagewright.files import replacing
from imagewright.types import UserError

MOST_DAYS = 90
"""Entries that were not used for longer make way when another is written."""


def cache_folder() -> Path | None:
    """The folder, made where it is not there; None where it cannot be had, or IMAGEWRIGHT_CACHE is set to nothing."""
    named = os.environ.get("IMAGEWRIGHT_CACHE")
    if named == "":
        return None
    try:
        usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(named) if named else Path(usual) / "imagewright"
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def entry(kind: str, *what: object) -> Path | None:
    """Where something of this kind, known by all of `what`, would be kept."""
    folder = cache_folder()
    return None if folder is None else folder / f"{kind}-{sha256(repr(what).encode()).hexdigest()[:40]}.safetensors"


def folder_entry(kind: str, *what: object) -> Path | None:
    """The same of what takes a folder; those of its kind that were not used for long make way."""
    named = entry(kind, *what)
    if named is None:
        return None
    wanted = named.with_suffix("")
    try:
        wanted.mkdir(exist_ok=True)
        os.utime(wanted)
        for other in named.parent.glob(f"{kind}-*"):
            if other.is_dir() and other.stat().st_mtime < time.time() - MOST_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)
    except OSError:
        return None
    return wanted


def recall(path: Path | None) -> tuple[dict[str, torch.Tensor], Head] | None:
    """What was kept there, its tensors mapped into memory rather than read; None where nothing whole is."""
    if path is None or not path.exists():
        return None
    try:
        found = read_tensors(path, finite=False), read_head(path)
        os.utime(path)
    except (UserError, OSError):
        return None
    return found


def keep(path: Path | None, tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    """Keep tensors and texts; where that fails they are not kept."""
    if path is None:
        return
    try:
        with replacing(path, flush=False) as aside:
            save_file(
                {name: tensor.clone() for name, tensor in tensors.items()}, aside, metadata=dict(texts)
            )  # some are views
        for other in path.parent.glob("*.safetensors"):
            if other.stat().st_mtime < time.time() - MOST_DAYS * 86400:
                other.unlink(missing_ok=True)
    except (UserError, OSError):
        path.unlink(missing_ok=True)
