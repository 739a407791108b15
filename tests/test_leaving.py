"""How one of several processes ends: by its exit code, with everything told, and without Python's own end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KEPT = """
import os, sys


class Kept:
    def __del__(self, write=os.write):
        write(1, b"python was taken down")


sys.kept = Kept()  # goes with the interpreter
"""
PROGRAM = """
import atexit, sys
from imagewright.leaving import run_and_leave


def run():
    atexit.register(print, "told at the end")
    print("worked")
    {end}


run_and_leave(run)
"""


@pytest.mark.parametrize(
    ("end", "code", "complaint"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('a reason')", 1, "a reason\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("sys.stderr.close()", 0, ""),
    ],
)
def test_it_ends_with_the_programs_code_and_without_pythons_end(end: str, code: int, complaint: str) -> None:
    done = subprocess.run([sys.executable, "-c", KEPT + PROGRAM.format(end=end)], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.endswith(complaint) and bool(done.stderr) == bool(complaint)
    assert done.stdout == ("worked\ntold at the end\n")


@pytest.mark.parametrize(("world", "taken_down"), [("", True), ("1", True), ("2", False)])
def test_the_command_ends_so_where_it_is_one_of_several(world: str, taken_down: bool, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(KEPT)
    env = {**os.environ, "WORLD_SIZE": world, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    words = [sys.executable, "-m", "imagewright", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr
    assert ("python was taken down" in done.stdout) == taken_down
