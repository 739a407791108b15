"""Where a record comes from: the commit of the source tree, and a hash of the code that a claim is made of."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[3]
"""Of the checkout, where there is one."""
PACKAGE = "imagewright.bench.claims"
CONTRACT = {"claim", "verdict", "runner", "ledger", "origin", "rehearsal", "rearranging"}
"""What says how claims are run and judged, and measures nothing."""


def code_hash(key: str) -> str | None:
    """SHA-256 of a claim's file and the files of this folder that it builds on; None for a claim from elsewhere."""
    return _hash(key, _here)


def equal_codes(record: Mapping[str, Any]) -> set[str | None]:
    """The hash of a claim's code as it is, and those that the record's rearrangements have shown to give the same."""
    equal = {code_hash(record["key"])}
    for step in reversed(record.get("rearranged", [])):
        if step["to"] in equal:
            equal.add(step["from"])
    return equal


def commit_of(key: str, code: str) -> str | None:
    """The newest commit whose files of a claim have a hash."""
    folder = FOLDER.relative_to(ROOT).as_posix()
    for found in git("rev-list", "HEAD").decode().split():
        if _hash(key, partial(_there, found, folder)) == code:
            return found
    return None


def commit() -> str | None:
    """Commit of the checkout that this code lies in, with a "+" where files differ from it; None without one."""
    if FOLDER.parents[2].name != "src":
        return None  # installed: a repository above it would be somebody else's
    try:
        head, status = (git(*words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "src")))
    except (OSError, subprocess.SubprocessError):
        return None
    return head.decode().strip() + ("+" if status else "")


def git(*words: str) -> bytes:
    """What git answers about this checkout."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, timeout=20, check=True).stdout


def _here(name: str) -> bytes | None:
    path = FOLDER / f"{name}.py"
    return path.read_bytes() if path.exists() else None


def _there(commit: str, folder: str, name: str) -> bytes | None:
    try:
        return git("show", f"{commit}:{folder}/{name}.py")
    except subprocess.CalledProcessError:
        return None


def _hash(key: str, read: Callable[[str], bytes | None]) -> str | None:
    """Of a file and what it imports from its folder, as `read` has them by name."""
    found: dict[str, bytes] = {}
    waiting = [key]
    while waiting:
        name = waiting.pop()
        text = None if name in found else read(name)
        if text is None:
            continue
        found[name] = text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
                waiting.append(node.module.removeprefix(f"{PACKAGE}."))
    measuring = sorted(found.keys() - CONTRACT)
    return hashlib.sha256(b"\0".join(found[name] for name in measuring)).hexdigest() if measuring else None
