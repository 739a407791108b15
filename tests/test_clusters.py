"""What the examples for clusters start: torchrun and the command take every word of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from imagewright.cli.command import run
from imagewright.cli.composing import Run
from imagewright.cli.couple import couple
from imagewright.cli.evaluate import COMMANDS as EVALUATE
from imagewright.cli.sample import sample
from imagewright.cli.train import find_experiment, parse

ROOT = Path(__file__).parents[1]


def slurm() -> list[str]:
    text = (ROOT / "examples/cluster/train.slurm").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^srun torchrun (.*)$", text, re.MULTILINE)
    return shlex.split(line.replace("$SLURM_NNODES", "2").replace("$SLURM_JOB_ID", "7").replace("$first", "host"))


def kubernetes() -> list[str]:
    text = (ROOT / "examples/cluster/train.yaml").read_text()
    (block,) = re.findall(r"command:\n((?: +- .*\n)+)", text)
    words = [line.strip().removeprefix("- ") for line in block.splitlines()]
    assert words[0] == "torchrun"
    return words[1:]


def page() -> list[str]:
    (line,) = re.findall(r"^    torchrun (.*train.*)$", (ROOT / "docs/distributed.md").read_text(), re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("words", [slurm, kubernetes, page])
def test_every_word_of_it_is_understood(words: object) -> None:
    assert callable(words)
    asked = get_args_parser().parse_args(words())
    assert (asked.module, asked.training_script, asked.training_script_args[0]) == (True, "imagewright", "train")
    assert int(asked.nproc_per_node) == 8 and (words is page or (int(asked.nnodes), int(asked.max_restarts)) == (2, 3))
    name, *options = asked.training_script_args[1:]
    run = parse([name, *options], Run(experiment=find_experiment(name)))
    assert run.experiment.training.parallel == "shard" and "imagenet" in run.experiment.data.source
    assert run.resume == (words is not page)


def test_torchrun_leaves_the_short_option_alone() -> None:
    (line,) = re.findall(r"^    torchrun (.*sample.*)$", (ROOT / "docs/distributed.md").read_text(), re.MULTILINE)
    asked = get_args_parser().parse_args(shlex.split(line))
    assert (asked.module, asked.training_script) == (True, "imagewright")
    assert asked.training_script_args == ["sample", "emoji64-32", "-n", "8"]


@pytest.mark.parametrize("function", [sample, EVALUATE[""], couple])
def test_it_is_the_long_one(function: Callable[..., None]) -> None:
    words = ["emoji64-32", "-n", "8", *(["--out", "x"] if function is couple else [])]
    told: list[dict[str, Any]] = []

    @wraps(function)
    def asked(**options: Any) -> None:
        told.append(options)

    run(asked, words, "imagewright")
    assert told[0]["n"] == 8
