"""Which parts run, for how long, and the one JSON that they fill."""

from __future__ import annotations

import argparse
import shlex
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from imagewright.bench.gpu import card, emoji, sampling, sharded, tests, training, updates
from imagewright.bench.gpu.scale import FULL, TOY, Scale
from imagewright.bench.gpu.timing import Deadline, Numbers, OutOfTime, alarm, forget
from imagewright.files import write_json
from imagewright.version import versions

Part = Callable[[Numbers, Numbers, Scale, torch.device, Deadline, Path], None]
"""(own results, all results, scale, device, deadline, folder): writes what it finds into its own results."""

PARTS: Mapping[str, tuple[Part, float]] = {
    "a": (card.measure, 0.02),
    "b": (training.measure, 0.38),
    "c": (sampling.measure, 0.13),
    "d": (updates.measure, 0.19),
    "e": (sharded.measure, 0.06),
    "t": (tests.measure, 0.26),
    "f": (emoji.measure, 0.0),
}
"""What measures a part, and its share of the minutes; f has what the others leave."""
MEASURED_MINUTES = 5.0
"""Of a to t together, at most, where f is to be run too."""


def run(options: argparse.Namespace, words: Sequence[str], say: Callable[[str], None]) -> int:
    """Run the parts that are asked for, and tell of each. Returns 1 where one failed, else 0."""
    device = torch.device("cpu" if options.toy else "cuda")
    scale = TOY if options.toy else FULL
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"
    results: Numbers = {
        "format": "imagewright-gpu/1",
        "command": "python -m imagewright.bench.gpu " + shlex.join(words),
        "device": described(device),
        "versions": versions() | {"cuda": torch.version.cuda, "cudnn": _cudnn()},
        "parts": {},
    }
    end = Deadline(60 * options.minutes)
    for name in options.parts:
        measure, share = PARTS[name]
        own: Numbers = {}
        results["parts"][name] = own
        _run(measure, own, results["parts"], scale, device, _seconds(name, share, options, end), options.out)
        write_json(path, results)
        say(f"{name}: {own['status']}, {own['wall_seconds']:.1f} s")
    say(f"written to {path}")
    return int(any(part["status"] == "failed" for part in results["parts"].values()))


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """The options. Exits with 2 where they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m imagewright.bench.gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json, and of part f's runs")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--parts", type=_names, default=tuple(PARTS), help="letters, as a,b,c; all where not given")
    parser.add_argument("--toy", action="store_true", help="every part at toy size, on the CPU")
    options = parser.parse_args(args)
    if options.minutes <= 0:
        parser.error(f"argument --minutes: {options.minutes:g} must be positive")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}; there are {', '.join(PARTS)}")
    return names


def _seconds(name: str, share: float, options: argparse.Namespace, end: Deadline) -> float:
    """A part's time: its share, scaled to the parts asked for, and never beyond the end."""
    shares = sum(PARTS[part][1] for part in options.parts)
    if not share:
        return end.left
    most: float = options.minutes
    minutes = min(most, MEASURED_MINUTES) if "f" in options.parts else most
    return min(60 * minutes * share / shares, end.left)


def _run(
    measure: Part, own: Numbers, parts: Numbers, scale: Scale, device: torch.device, seconds: float, folder: Path
) -> None:
    """One part to its end, its time's end or its failure, which is written down."""
    started = time.monotonic()
    own["status"] = "done"
    try:
        with alarm(seconds):
            measure(own, parts, scale, device, Deadline(seconds), folder)
    except OutOfTime:
        own["status"] = "out of time"
    except Exception as error:
        # What interrupts a compiler comes out of it as the compiler's own error.
        own["status"] = "out of time" if time.monotonic() - started >= seconds else "failed"
        own["error"] = "".join(traceback.format_exception(error))[-2000:]
    own["wall_seconds"] = time.monotonic() - started
    with suppress(Exception):  # a broken device is the next part's finding
        forget(device)


def _cudnn() -> int | None:
    found: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return found


def described(device: torch.device) -> Numbers:
    """What the device is."""
    if device.type != "cuda":
        return {"name": "cpu", "threads": torch.get_num_threads()}
    known = torch.cuda.get_device_properties(device)
    return {
        "name": known.name,
        "memory_bytes": known.total_memory,
        "multiprocessors": known.multi_processor_count,
        "capability": f"{known.major}.{known.minor}",
    }
