"""What several folders of tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# One thread for each worker and the processes it starts: on two cores, two workers of two threads take twice as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

TINY = """
import dataclasses
from imagewright.networks import SongUNetConfig
from imagewright.recipes import RECIPES

run = RECIPES["edm-digits"]()
experiment = dataclasses.replace(
    run,
    network=SongUNetConfig(img_resolution=8, in_channels=1, out_channels=1, model_channels=8, channel_mult=(1,),
                           num_blocks=1, attn_resolutions=(), dropout=0.1),
    training=dataclasses.replace(run.training, total_images=64, batch=16, log_images=16, snapshot_images=32,
                                 checkpoint_images=32),
)
"""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file for `imagewright train`: four steps of a tiny network with dropout on digits."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(TINY)
    return path
