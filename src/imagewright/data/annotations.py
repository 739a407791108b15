"""What is known of each picture: from `dataset.json`, or from the class folders and splits it lies in.

Source: the labels of NVlabs/edm's data sets, {"labels": [[file, class], ...] or null}, and our further keys
(`edm_zip`). A file whose label is missing or senseless is a finding with a reason; a `dataset.json` of
another shape is a UserError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from imagewright import limits
from imagewright.data.archive import Archive, readable_name, same_name
from imagewright.data.pixels import BadPicture
from imagewright.files import parse_json
from imagewright.types import UserError

LARGEST_LABEL = limits.CLASSES - 1
_TEXTS = ("name", "subgroup", "split")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Folders at the top that are no classes, in any case of letters."""


@dataclass(kw_only=True)
class Annotations:
    """labels: class of each usable picture by name, or None when the source has no classes.

    bad: (name, reason). texts: caption, subgroup and split by name, under "name", "subgroup" and "split".
    """

    labels: dict[str, int] | None = None
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    bad: list[tuple[str, str]] = field(default_factory=list)
    texts: dict[str, dict[str, str]] = field(default_factory=lambda: {key: {} for key in _TEXTS})


def annotate(archive: Archive, *, labels: bool) -> Annotations:
    """Read `dataset.json` if there is one, else take the folders' names in sorted order as classes.

    Folders at the top that are all called train, val, test or the like are splits, and the classes lie in them. A class
    folder without pictures is a class. labels: False ignores every class.
    Raises UserError when `dataset.json` is damaged or of another shape, and where splits lie beside other folders.
    """
    base = _home(archive)
    if base is None:
        return _from_folders(archive, labels)
    name = f"{base}dataset.json"
    where = f"{archive.path}: {name}"
    try:
        content = archive.read(name)
    except BadPicture as finding:
        raise UserError(f"{where} cannot be read: {finding}") from None
    if len(content) > limits.LABELS:
        raise UserError(f"{where} is larger than {limits.LABELS} bytes, the most that such a file may have")
    meta = parse_json(content, where)
    if not isinstance(meta, dict) or "labels" not in meta:
        raise UserError(f'{where} must be an object with the key "labels"')
    out = Annotations()
    if labels and meta["labels"] is not None:
        _read_labels(out, archive, base, meta["labels"], where)
        _read_classes(out, meta.get("classes"), where)
    _read_texts(out, archive, base, meta.get("pictures"), where)
    return out


def _home(archive: Archive) -> str | None:
    """The folder of the `dataset.json` that counts ("" or "a/b/"): the topmost one above all pictures."""
    shared = _common_folder(archive.pictures)
    for depth in range(len(shared) + 1):
        base = "".join(f"{part}/" for part in shared[:depth])
        if f"{base}dataset.json" in archive.others:
            return base
    return None


def _common_folder(names: Iterable[str]) -> tuple[str, ...]:
    """The folders that all names start with: ("a", "b") for a/b/1.png and a/b/c/2.png."""
    parents = [PurePosixPath(n).parent.parts for n in names]
    shared = []
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return tuple(shared)


def _from_folders(archive: Archive, labels: bool) -> Annotations:
    base = _common_folder(archive.pictures)
    below = {n: tuple(map(same_name, PurePosixPath(n).parts[len(base) : -1])) for n in archive.pictures}
    split = _splits({folders[:1] for folders in below.values()}, archive)
    out = Annotations()
    if split:
        out.texts["split"] = {n: split[folders[0]] for n, folders in below.items()}
        below = {n: folders[1:] for n, folders in below.items()}
    if not labels or not any(below.values()):
        return out
    empty = _folders_at(archive, base, tuple(split))
    classes = sorted({folders[0] for folders in below.values() if folders} | empty)
    index = {c: i for i, c in enumerate(classes)}
    out.labels = {n: index[folders[0]] for n, folders in below.items() if folders}
    out.num_classes, out.class_names = len(classes), tuple(map(readable_name, classes))
    reason = "lies outside the class folders (open without labels to use it)"
    out.bad = [(n, reason) for n, folders in below.items() if not folders]
    return out


def _splits(tops: set[tuple[str, ...]], archive: Archive) -> dict[str, str]:
    """Splits by the folders' names, where all folders at the top are splits; {} where they are classes, or none."""
    found = {top[0]: SPLITS[top[0].lower()] for top in tops if top and top[0].lower() in SPLITS}
    if len(set(found.values())) < 2:
        return {}
    others = sorted(top[0] if top else "pictures" for top in tops if not top or top[0] not in found)
    if others:
        names = ", ".join(sorted(found))
        raise UserError(
            f"{archive.path} has {names} beside {', '.join(map(readable_name, others[:3]))}: are they splits or "
            "classes? Move the splits to a folder of their own, or say which picture is what in a dataset.json"
        )
    return found


def _folders_at(archive: Archive, base: tuple[str, ...], splits: tuple[str, ...]) -> set[str]:
    """The folders where classes lie, also those without pictures."""
    depth = len(base) + bool(splits)
    paths = [tuple(map(same_name, f.split("/"))) for f in archive.folders]
    start = tuple(map(same_name, base))
    inside = [p for p in paths if len(p) == depth + 1 and p[: len(base)] == start]
    return {p[depth] for p in inside if not splits or p[len(base)] in splits}


def _read_labels(out: Annotations, archive: Archive, base: str, entries: Any, where: str) -> None:
    if not isinstance(entries, list):
        raise UserError(f'{where}: "labels" must be a list of [file, class], or null')
    out.labels = {}
    present = {same_name(n): n for n in archive.pictures}
    seen: set[str] = set()
    for i, entry in enumerate(entries):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f"{where}: entry {i} of labels is {_short(entry)}; it must be [file, class]")
        written, label = same_name(base + entry[0]), entry[1]
        name = present.get(written, written)
        if name in seen:
            out.labels.pop(name, None)
            out.bad.append((name, "labelled more than once in dataset.json"))
        elif written not in present:
            out.bad.append((name, "labelled in dataset.json, but there is no such picture"))
        elif type(label) is not int or not 0 <= label <= LARGEST_LABEL:  # bool is an int to isinstance
            reason = f"its label in dataset.json is {_short(label)}; it must be a whole number"
            out.bad.append((name, f"{reason} from 0 to {LARGEST_LABEL}"))
        else:
            out.labels[name] = label
        seen.add(name)
    out.bad += [(n, "has no label in dataset.json") for n in archive.pictures if n not in seen]
    out.num_classes = max(out.labels.values(), default=-1) + 1


def _read_classes(out: Annotations, classes: Any, where: str) -> None:
    if classes is None or out.labels is None:
        return
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UserError(f'{where}: "classes" must be a list of names')
    if len(classes) > limits.CLASSES:
        raise UserError(f"{where} has {len(classes)} classes; at most {limits.CLASSES} are allowed")
    for name in [n for n, label in out.labels.items() if label >= len(classes)]:
        reason = f"its label in dataset.json is {out.labels.pop(name)}; there are {len(classes)} classes"
        out.bad.append((name, reason))
    out.num_classes, out.class_names = len(classes), tuple(classes)


def _read_texts(out: Annotations, archive: Archive, base: str, pictures: Any, where: str) -> None:
    if pictures is None:
        return
    if not isinstance(pictures, Mapping) or not all(isinstance(p, Mapping) for p in pictures.values()):
        raise UserError(f'{where}: "pictures" must be an object of objects, one a file')
    present = {same_name(n): n for n in archive.pictures}
    for name, known in pictures.items():
        written = same_name(base + name)
        for key in _TEXTS:
            if key in known:
                if not isinstance(known[key], str):
                    raise UserError(f"{where}: {key} of {name} is {_short(known[key])}; it must be text")
                out.texts[key][present.get(written, written)] = known[key]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
