"""Where a record comes from: the commit of the source tree, and a hash of the code that a claim is made of."""

from __future__ import annotations

import ast
import hashlib
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
PACKAGE = "imagewright.bench.claims"
CONTRACT = {"claim", "verdict", "runner", "ledger", "origin"}
"""What says how claims are run and judged, and measures nothing."""


def code_hash(key: str) -> str | None:
    """SHA-256 of a claim's file and the files of this folder that it builds on; None for a claim from elsewhere."""
    files = _files(key)
    if not files:
        return None
    return hashlib.sha256(b"\0".join(files[name].read_bytes() for name in sorted(files))).hexdigest()


def commit() -> str | None:
    """Commit of the checkout that this code lies in, with a "+" where files differ from it; None without one."""
    if FOLDER.parents[2].name != "src":
        return None  # installed: a repository above it would be somebody else's
    try:
        head, status = (_git(*words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "src")))
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if status else "")


def _git(*words: str) -> str:
    root = FOLDER.parents[3]
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _files(key: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    waiting = [key]
    while waiting:
        name = waiting.pop()
        path = FOLDER / f"{name}.py"
        if name in found or not path.exists():
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
                waiting.append(node.module.removeprefix(f"{PACKAGE}."))
    return {name: path for name, path in found.items() if name not in CONTRACT}
