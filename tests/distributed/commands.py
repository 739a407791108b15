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
    for words in json.loads(Path(sys.argv[1]).read_text()):
        main(words)
        # Who is first with a command would find the meeting place of the one before, which another has yet to leave.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


if __name__ == "__main__":
    run_and_leave(run)
