"""The hostile corpus does nothing but be refused: every second case here, all of them by `run.py`."""

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
