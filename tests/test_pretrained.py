"""Models that ship with the package: small, whole, of the right kind, and found by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import imagewright
from imagewright.arrays import read_tensors
from imagewright.cli.main import main
from imagewright.models.files import weights_hash
from imagewright.pretrained import find_model, shipped
from imagewright.samplers import Heun
from imagewright.types import UserError

FOLDER = Path(imagewright.__file__).parent / "pretrained"


def test_the_emoji_teacher_ships() -> None:
    assert "emoji64-32" in shipped()


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_model_is_small_and_whole(name: str) -> None:
    weights, header = FOLDER / name / "model.safetensors", json.loads((FOLDER / name / "model.json").read_text())
    assert weights.stat().st_size < 8_000_000
    assert header["parameters"] <= 4_000_000
    assert header["weights_sha256"] == weights_hash(read_tensors(weights))
    assert (Path(__file__).parents[1] / "docs" / "models" / f"{name}.md").is_file()  # every shipped model has a card
    file = find_model(name)
    assert all(p.dtype.itemsize == 4 for p in file.model.parameters())


def test_the_emoji_teacher_draws_class_by_class() -> None:
    generator = imagewright.load("emoji64-32", Heun(num_steps=6))
    assert generator.spec.shape == (3, 32, 32) and len(generator.spec.class_names) == 9
    smileys, flags = generator.generate(6, labels=0, seed=2), generator.generate(6, labels=8, seed=2)
    assert smileys.shape == (6, 32, 32, 3) and not np.array_equal(smileys, flags)
    # Flags are wide and fill the middle row; emoji stand on white.
    assert smileys[:, 0].mean() > 200 and flags[:, 16].mean() < smileys[:, 0].mean()


def test_sample_works_right_after_installation(tmp_path: Path) -> None:
    main(["sample", "emoji64-32", "--n", "3", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert len(list(tmp_path.glob("0*.png"))) == 3


def test_an_unknown_name_is_told_with_what_there_is() -> None:
    with pytest.raises(
        UserError, match=r"emoji65 is neither a folder with a model\.safetensors nor a shipped model \(.*emoji64-32"
    ):
        find_model("emoji65")
