"""Two processes without a launcher of their own: torchrun's would be a third interpreter."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def together() -> Callable[..., list[str]]:
    """Runs a script in several processes, as torchrun would start them; returns what each printed."""

    def run(script: Path, *args: str, world: int = 2) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, str(script), *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]  # fmt: skip
        try:
            told = [process.communicate(timeout=900)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        for process, text in zip(started, told, strict=True):
            assert process.returncode == 0, text
        return told

    return run
