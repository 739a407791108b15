"""How fast a run trains is measured on what the device has done, as the run would do it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from imagewright.data import open_images
from imagewright.recipes import RECIPES
from imagewright.training.pace import images_per_second
from imagewright.training.trainer import Trainer
from imagewright.training.watch import Watch


def test_the_device_is_waited_for_and_rounds_as_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's host is far ahead of it."""
    run, done = RECIPES["edm-digits"](), list[Any]()
    monkeypatch.setattr(Trainer, "train_step", lambda self: done.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(Watch, "look", lambda self: done.append("waited"))
    run = replace(run, training=replace(run.training, tf32=True))
    images_per_second(run, open_images("digits"), seconds=1e-9)
    assert done == [True, "waited", True, "waited"]
