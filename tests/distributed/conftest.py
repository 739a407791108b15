"""Two processes without a launcher of their own: torchrun's would be a third interpreter."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
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
        with contextlib.ExitStack() as files:
            told = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
            started = [
                subprocess.Popen(
                    [sys.executable, str(script), *args], stdout=told[rank], stderr=subprocess.STDOUT,
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(world)
            ]  # fmt: skip
            codes: list[int | None] = [None]
            deadline = time.monotonic() + 900
            while None in codes and time.monotonic() < deadline:
                time.sleep(0.05)
                codes = [process.poll() for process in started]
                if any(codes):  # the others would wait for it
                    break
            for process in started:
                process.kill()
            texts = []
            for file in told:
                file.seek(0)
                texts.append(file.read())
        assert not any(codes) and None not in codes, "\n".join(texts)
        return texts

    return run
