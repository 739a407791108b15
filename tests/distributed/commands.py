"""Commands, one after the other, in each of several processes: what torchrun would start. Argument: a JSON file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from imagewright.cli.main import main
from imagewright.leaving import run_and_leave


def run() -> None:
    torch.set_num_threads(1)
    commands = json.loads(Path(sys.argv[1]).read_text())
    for words, port in zip(commands, os.environ["MASTER_PORTS"].split(), strict=True):
        os.environ["MASTER_PORT"] = port  # in the store of another command are its processes' addresses
        main(words)


if __name__ == "__main__":
    run_and_leave(run)
