"""Part t: the tests that need a card, as a process of its own, as many at once as there are cores for."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

from imagewright.bench.gpu.scale import Scale
from imagewright.bench.gpu.timing import Deadline, Numbers

TESTS = Path("tests") / "test_cuda.py"
WORKERS = 6
"""Processes; each keeps a context of the card of its own."""
LEAVING = 12.0
"""Seconds to end in."""


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """What pytest says at the end; its whole output is in OUT/tests.txt. Raises RuntimeError where a test fails."""
    if not TESTS.exists() or importlib.util.find_spec("pytest") is None:
        own["left_out"] = f"needs pytest, and {TESTS} in the folder where it is called"
        return
    command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "--durations=8", "--tb=short"]
    if importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) > WORKERS:
        command += ["-n", str(WORKERS)]
    written = folder / "tests.txt"
    with written.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            own["code"] = process.wait(max(deadline.left - LEAVING, 1))
        except subprocess.TimeoutExpired:
            own["code"] = None
            process.send_signal(signal.SIGINT)  # it still tells what has failed until now
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVING)
        finally:
            process.kill()
            own["end"] = written.read_text(errors="replace")[-12_000:]
    deadline.check()
    if own["code"]:
        raise RuntimeError("tests failed")
