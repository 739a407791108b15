"""`python -m imagewright.bench.gpu`"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from imagewright.bench.gpu.command import parsed, run
from imagewright.leaving import run_and_leave


def main(args: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for. 0; 1 where one failed; 2 without a GPU."""
    words = sys.argv[1:] if args is None else args
    options = parsed(words)
    if not options.toy and not torch.cuda.is_available():
        print("there is no CUDA device here; --toy runs every part at toy size on the CPU", file=sys.stderr)
        return 2
    return run(options, words, lambda line: print(line, flush=True))


if __name__ == "__main__":
    run_and_leave(lambda: sys.exit(main()))  # a group of processes has been met in part e
