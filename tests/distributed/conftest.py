"""Two processes without a launcher of their own: torchrun's would be a third interpreter."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore


@pytest.fixture(scope="session")
def together() -> Callable[..., list[str]]:
    """Runs a script in several processes, as torchrun would start them; returns what each printed.

    groups: how often they form one; each time they meet in a store of its own (MASTER_PORTS).
    """

    def run(script: Path, *args: str, world: int = 2, groups: int = 1) -> list[str]:
        # Held here, as torchrun's are by its agent: a port that is only known to be free may be another's by then.
        stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(groups)]
        ports = [str(store.port) for store in stores]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "OMP_NUM_THREADS": "1"}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORTS": " ".join(ports)}
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
            deadline = time.monotonic() + 1800
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
