"""Stop every writing command between two things that it does to files: `stops.py [--short | --long SEED] [NAMES]`.

A command is stopped by a kill, by Ctrl-C, or by a disk that takes no more. It has to end as it promises, models and
records that are there have to be whole, and the same command again has to leave what one leaves that was never stopped.
NAMES: only commands whose names match. --short: one stop of some. --long: at random, until it is stopped. Else: all.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)  # what has threads of its own cannot be forked

from sources import CONFIG, make_sources  # noqa: E402

from imagewright.bench.claims import Check, Claim, Row  # noqa: E402
from imagewright.bench.claims.claim import by_how_much  # noqa: E402
from imagewright.cli import bench  # noqa: E402
from imagewright.cli.main import main as imagewright  # noqa: E402
from imagewright.models.consistency import ConsistencyModel  # noqa: E402
from imagewright.models.files import ModelFile, has_model, load_model, save_model  # noqa: E402
from imagewright.networks import SongUNet  # noqa: E402
from imagewright.types import DataSpec  # noqa: E402

OWN = """
from dataclasses import replace
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun
from imagewright.training.config import EmaConfig

run = RECIPES["edm-digits"]()
each = dict.fromkeys(("log_images", "snapshot_images", "weights_images"), 8)
experiment = replace(
    run,
    network=replace(run.network, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=()),
    sampler=Heun(num_steps=1),
    training=replace(run.training, total_images=24, batch=8, checkpoint_images=16, ema=EmaConfig(power_std=(0.1, 0.2)),
                     **each),
)
"""
SHORT = ("train", "sample", "couple", "export", "convert", "fresh")
"""Commands of the short form."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"})
FULL = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT)
PASSING = {"seconds", "cpu_seconds", "images_per_second", "command", "commit"}
"""Entries of records that no two runs share."""


@dataclass(frozen=True)
class Command:
    """words: as given first. again: what is given after a stop, where that is more."""

    words: tuple[str, ...]
    again: tuple[str, ...] = ()


def commands() -> dict[str, Command]:
    """Every command that writes, small."""
    lines = {
        "train": "train own.py --out run2 --device cpu",
        "sample": "sample model --n 3 --npz --trajectory --out drawn --device cpu",
        "edit": "edit jump --task denoise --image one.png --sigma 0.2 --n 1 --out edited --device cpu",
        "evaluate": "evaluate model --data digits --split test --n 8 --metrics fd --no-yardsticks --out scores.json",
        "couple": "couple model --n 3 --shard 2 --out pairs2 --device cpu",
        "ema": "tune ema kept --std 0.15 --out average",
        "bespoke": "tune bespoke model --steps 1 --iterations 1 --batch 1 --out solver.json --device cpu",
        "export": "export model --out exported",
        "import": "import weights.pt --config config.json --out imported",
        "convert": "data convert pictures converted.zip",
        "report": "report run --out page.html",
        "claims": "bench claims edm --seeds 10000 10001 --out records",
        "fresh": "bench claims edm --seeds 10000 10001 --fresh --out old-records",
        "ledger": "bench claims --ledger --out old-records",
    }
    again = {"train": ("--resume",)}
    return {name: Command(tuple(line.split()), again.get(name, ())) for name, line in lines.items()}


def _toy(seed: int, budget: str) -> Sequence[Row]:
    return [Row(name="ours", score=1.0 + seed % 7, cost=1), Row(name="theirs", score=2.0, cost=1)]


TOY = Claim(
    key="edm", paper="2206.00364", headline="1", miniature="A toy.", measure="error", cost="NFE", run=_toy,
    checks=[Check(says="ours is lower", effect=by_how_much("ours", "theirs"))],
)  # fmt: skip


def prepare(folder: Path) -> None:
    """What the commands start from."""
    bench.KEYS, bench.load_claim = ("edm",), lambda key: TOY  # type: ignore[attr-defined, assignment]
    make_sources(folder)
    (folder / "own.py").write_text(OWN)
    spec = DataSpec(name="digits", resolution=8, channels=1)
    save_model(folder / "jump", ModelFile(model=ConsistencyModel(SongUNet(CONFIG)), spec=spec))
    shutil.copy(folder / "pictures/0.png", folder / "one.png")
    for words in (
        ("train", "own.py", "--out", "kept", "--device", "cpu"),
        ("bench", "claims", "edm", "--seeds", "10000", "10001", "10002", "--out", "old-records"),
    ):
        code, said, _ = run(words, folder)
        assert code == 0, said


def run(words: Sequence[str], folder: Path, stop: int = 0, kind: str = "") -> tuple[int, str, int]:
    """Exit code (a signal's negative), what was said, and how often it was about to change a file in the folder.

    stop: at which of these times it is stopped.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        _child(words, folder, stop, kind)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    counted = re.search(r"COUNTED (\d+)\n$", said)
    return os.waitstatus_to_exitcode(status), said, int(counted[1]) if counted else 0


def _child(words: Sequence[str], folder: Path, stop: int, kind: str) -> None:
    code, count = 0, 0
    inside = os.path.realpath(folder) + os.sep

    def note(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in CHANGING or (event == "open" and isinstance(args[2], int) and args[2] & WRITING)
        if not changes or not isinstance(args[0], (str, bytes)):
            return
        if not os.path.abspath(os.fsdecode(args[0])).startswith(inside):
            return
        count += 1
        if count == stop and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if count == stop and kind == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if stop and count >= stop and kind == "full" and event != "os.remove":
            number = FULL[stop % len(FULL)]
            raise OSError(number, os.strerror(number), args[0])

    try:
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.addaudithook(note)
        imagewright(list(words))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    print(f"COUNTED {count}", flush=True)
    os._exit(code)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder, without what no two runs share."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("events.out.") and "__pycache__" not in path.parts:
            found[str(path.relative_to(folder))] = _content(path)
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _lasting(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [_lasting(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes() if path.suffix not in (".html", ".md") else path.read_text()[-8:]


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in PASSING}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def faults_of(command: Command, sources: Path, place: Path, whole: dict[str, Any], stop: int, kind: str) -> list[str]:
    """Stop it there in a copy of the sources, look, give it again, and say what went wrong."""
    _copied(sources, place)
    code, said, _ = run(command.words, place, stop, kind)
    faults = []
    allowed = {"kill": (-signal.SIGKILL, 0), "interrupt": (130, 0), "full": (2, 0)}[kind]
    if code not in allowed or "Traceback" in said:
        faults.append(f"it ended with {code}: {said[-1500:]}")
    if code == 2 and len([line for line in said.splitlines() if line.startswith("imagewright: ")]) != 1:
        faults.append(f"it did not end with one sentence: {said[-600:]!r}")
    if code == 0 and (lost := _differences(contents(place), whole)):
        faults.append(f"it ended well without {lost}")
    for folder in (path for path in place.iterdir() if path.is_dir() and has_model(path)):
        try:
            load_model(folder)
        except Exception as error:
            faults.append(f"it left a model that is none: {error}")
    if kind == "full" and (left := [p.name for p in place.rglob(".*") if p.is_file()]):
        faults.append(f"it left {left}")
    code, said, _ = run((*command.words, *command.again), place)
    if code != 0 and not (code == 2 and "already holds a model" in said):
        faults.append(f"given again it ended with {code}: {said[-1500:]}")
    if lost := _differences(contents(place), whole):
        faults.append(f"given again it left something else: {lost}")
    return faults


def _differences(found: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*found, *whole}) if name not in found or found[name] != whole.get(name)]


def _copied(sources: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sources, place)


KINDS = ("kill", "full", "interrupt")


def stops(count: int, how: str, rng: random.Random) -> Iterator[tuple[int, str]]:
    """At which of a command's changes to stop it, and by what."""
    if how == "all":
        yield from ((stop, kind) for stop in range(1, count + 1) for kind in KINDS)
        return
    for kind in rng.sample(KINDS, 1) if how == "short" else KINDS:
        yield rng.randint(1, count), kind


def check_all(part: str, how: str, rng: random.Random) -> tuple[int, int]:
    """How many stops were tried, and how many went wrong, which are printed."""
    tried = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        sources, place = Path(folder) / "sources", Path(folder) / "place"
        sources.mkdir()
        prepare(sources)
        while True:
            for name, command in commands().items():
                if not re.search(part, name) or (how == "short" and name not in SHORT):
                    continue
                began = time.monotonic()
                _copied(sources, place)
                code, said, count = run(command.words, place)
                assert code == 0 and count, f"{name}: {said}"
                whole = contents(place)
                for stop, kind in stops(count, how, rng):
                    faults = faults_of(command, sources, place, whole, stop, kind)
                    tried, wrong = tried + 1, wrong + bool(faults)
                    print("".join(f"{name}, {kind} at {stop} of {count}: {f}\n" for f in faults), end="", flush=True)
                if how == "all":
                    print(f"{name}: {count} changes, {time.monotonic() - began:.0f} s", flush=True)
            if how != "long":
                return tried, wrong
            print(f"{tried} stops, {wrong} went wrong", flush=True)


def main(args: list[str]) -> int:
    """How many stops went wrong."""
    how = "long" if "--long" in args else "short" if "--short" in args else "all"
    seed = args[args.index("--long") + 1] if how == "long" else "0"
    part = next((a for a in args if not a.startswith("--") and (how != "long" or a != seed)), "")
    tried, wrong = check_all(part, how, random.Random(seed))
    print(f"{tried} stops, {wrong} went wrong", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
