"""Open the hostile corpus under watch, and print each fault: `python tests/hostile/run.py [--short] [NAMES]`.

NAMES: only cases whose names match this regular expression. --short: every second of them. --long SEED: after them,
whole files of every kind with bytes changed at random, from this seed on, until it is stopped.
"""

from __future__ import annotations

import importlib
import os
import random
import re
import shutil
import stat
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["IMAGEWRIGHT_CACHE"] = ""  # what is kept for another time would be a file outside the folder
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)  # what has threads of its own cannot be forked

from corpus import FILES, Case, cases  # noqa: E402
from sources import make_sources  # noqa: E402
from watch import watched  # noqa: E402

from imagewright.cli.console import printable  # noqa: E402
from imagewright.cli.main import COMMANDS  # noqa: E402
from imagewright.types import UserError  # noqa: E402

TOGETHER = 10
"""Files opened in one process."""


def faults_of(case: Case, sources: Path, place: Path) -> list[str]:
    """Make one case in a copy of the sources, open it, and say what went wrong."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sources, place)
    case.make(place)
    faults, refused = watched(lambda: case.act(place), place)
    if not refused and not faults and not case.harmless:
        faults.append("it was taken")
    if any(p.name in ("OWNED", "owned.png") for p in place.rglob("*")) or Path("/tmp/owned.png").exists():
        faults.append("its code was run, or its file written")
    if not stat.S_ISCHR(os.stat("/dev/null").st_mode):
        faults.append("/dev/null is no device any more")
    return faults


def faults_of_all(batch: list[Case], sources: Path, place: Path) -> dict[str, list[str]]:
    """The same of several, in one process, which is quicker; where anything went wrong, each once more by itself."""
    folders = {case.name: place / str(i) for i, case in enumerate(batch)}
    shutil.rmtree(place, ignore_errors=True)
    for case in batch:
        shutil.copytree(sources, folders[case.name])
        case.make(folders[case.name])

    def open_all() -> None:
        for case in batch:
            os.chdir(folders[case.name])
            try:
                case.act(folders[case.name])
            except UserError as error:
                print(printable(str(error)))
                continue
            except SystemExit as ended:
                if ended.code == 2:
                    continue
            if not case.harmless:
                raise AssertionError(f"{case.name} was taken")

    faults, _ = watched(open_all, place, len(batch))
    if not faults and not any(p.name in ("OWNED", "owned.png") for p in place.rglob("*")):
        return {}
    found = {case.name: each for case in batch if (each := faults_of(case, sources, place))}
    return found or {"together: " + ", ".join(c.name for c in batch): faults or ["code was run"]}


def changed(rng: random.Random) -> Case:
    """One whole file with some bytes changed, left out, repeated or cut off."""
    name, (path, act) = rng.choice([(n, w) for n, w in FILES.items() if n not in ("edited", "sampled", "array", "zip")])
    seed = rng.getrandbits(32)

    def make(folder: Path) -> None:
        inner, content = random.Random(seed), bytearray((folder / path).read_bytes())
        for _ in range(inner.choice((1, 1, 2, 8))):
            at = (
                inner.randrange(max(len(content), 1))
                if inner.random() < 0.5
                else inner.randrange(min(len(content), 400) or 1)
            )
            match inner.randrange(4):
                case 0:
                    content[at : at + 1] = bytes([inner.randrange(256)])
                case 1:
                    del content[at : at + inner.randrange(1, 9)]
                case 2:
                    content[at:at] = content[at : at + inner.randrange(1, 65)]
                case _:
                    content[at : at + 8] = inner.choice((b"\xff" * 8, b"\0" * 8, b"99999999", b"[[[[[[[["))
        (folder / path).write_bytes(content)

    return Case(f"changed-{name}-{seed}", make, act, harmless=True)


def main(args: list[str]) -> int:
    """How many cases went wrong."""
    long = args[args.index("--long") + 1] if "--long" in args else None
    part = next((a for a in args if not a.startswith("--") and a != long), "")
    for module, _ in COMMANDS.values():
        importlib.import_module(module)  # once here, and not in every process that opens a file
    with tempfile.TemporaryDirectory() as folder:
        sources, place = Path(folder) / "sources", Path(folder) / "case"
        sources.mkdir()
        make_sources(sources)
        count = wrong = 0

        def check(batch: list[Case]) -> None:
            nonlocal count, wrong
            found = faults_of_all(batch, sources, place)
            count, wrong = count + len(batch), wrong + len(found)
            for name, faults in found.items():
                print("\n".join(f"{name}: {fault}" for fault in faults), flush=True)

        chosen = [case for case in cases() if re.search(part, case.name)][:: 2 if "--short" in args else 1]
        for at in range(0, len(chosen), TOGETHER):
            check(chosen[at : at + TOGETHER])
        print(f"{count} cases, {wrong} went wrong", flush=True)
        rng = random.Random(long)
        while long is not None:
            check([changed(rng) for _ in range(TOGETHER)])
            if count % (50 * TOGETHER) == 0:
                print(f"{count} cases, {wrong} went wrong", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
