"""Hostile files, options and stops, each in a short form; all of them by `run.py`, `fuzz.py` and `stops.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run.py"


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_no_hostile_file_does_anything() -> None:
    done = subprocess.run([sys.executable, str(RUN), "--short"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    said = done.stdout.splitlines()[-1]
    assert int(said.split()[0]) >= 150, said


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_no_option_and_no_stop_does_harm() -> None:
    both = "import sys; sys.path.insert(0, sys.argv[1]); import fuzz, stops; "
    both += "sys.exit(bool(fuzz.main(['--short']) + stops.main(['--short'])))"
    words = [sys.executable, "-c", both, str(RUN.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "100 lines, 0 went wrong" in done.stdout and "6 stops, 0 went wrong" in done.stdout
