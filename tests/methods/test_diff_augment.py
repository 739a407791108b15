"""Differentiable augmentation: each operation against its definition, and the gradient through all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imagewright.methods.diff_augment import DiffAugment
from imagewright.noise import StepNoise
from imagewright.types import UserError

OFF = {"brightness": 0.0, "saturation": 0.0, "contrast": 0.0, "translation": 0.0, "cutout": 0.0}
N = 400


def images(n: int = N, side: int = 16) -> Tensor:
    return StepNoise(1).normal(torch.empty(n, 3, side, side, dtype=torch.float64))


def augmented(**on: float) -> Tensor:
    return DiffAugment(**(OFF | on))(images(), StepNoise(2))


def test_all_off_changes_nothing() -> None:
    assert torch.equal(augmented(), images())


def test_brightness_adds_one_number_to_each_image() -> None:
    change = (augmented(brightness=0.5) - images()).flatten(1)
    torch.testing.assert_close(change, change[:, :1].expand_as(change), rtol=0, atol=1e-12)
    assert -0.5 <= change.min() < -0.45 and 0.45 < change.max() <= 0.5


@pytest.mark.parametrize(("name", "axes"), [("saturation", (1,)), ("contrast", (1, 2, 3))])
def test_stretching_keeps_the_mean_and_scales_the_rest(name: str, axes: tuple[int, ...]) -> None:
    before, after = images(), augmented(**{name: 0.5})
    mean = before.mean(axes, keepdim=True)
    torch.testing.assert_close(after.mean(axes, keepdim=True), mean, rtol=0, atol=1e-12)
    factor = ((after - mean) / (before - mean)).flatten(1).median(1).values
    torch.testing.assert_close(after, mean + factor[:, None, None, None] * (before - mean), rtol=0, atol=1e-9)
    assert 0.5 <= factor.min() < 0.55 and 1.45 < factor.max() <= 1.5


def test_translation_moves_by_whole_pixels_and_fills_with_zero() -> None:
    before, after = images(), augmented(translation=0.125)
    padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
    shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    candidates = torch.stack([padded[:, :, 2 - dy : 18 - dy, 2 - dx : 18 - dx] for dy, dx in shifts], 1)
    same = (candidates == after[:, None]).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    assert (same.sum(0) > 0).all()  # all 25 shifts occur


def test_cutout_is_a_square_hole_that_may_leave_the_image() -> None:
    hole = (augmented(cutout=0.2) == 0).all(1)  # 16 * 0.2 -> 3 pixels
    torch.testing.assert_close(augmented(cutout=0.2)[~hole[:, None].expand(N, 3, 16, 16)],
                               images()[~hole[:, None].expand(N, 3, 16, 16)])  # fmt: skip
    rows, columns = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), rows * columns)  # a full rectangle
    assert set(rows.tolist()) == {2, 3} == set(columns.tolist())  # at the border a part of it
    assert hole.any(0).all()


def test_small_images_of_one_channel() -> None:
    grey = StepNoise(3).normal(torch.empty(50, 1, 8, 8))
    changed = DiffAugment()(grey, StepNoise(4))
    assert changed.shape == grey.shape and changed.dtype == torch.float32 and not torch.equal(changed, grey)


def test_gradients_pass() -> None:
    x = images(2, 8).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: DiffAugment()(x, StepNoise(5)), (x,))


def test_noise_decides_alone() -> None:
    assert torch.equal(DiffAugment()(images(), StepNoise(6)), DiffAugment()(images(), StepNoise(6)))
    assert not torch.equal(DiffAugment()(images(), StepNoise(6)), DiffAugment()(images(), StepNoise(7)))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [("brightness", -0.1, "be >= 0 and finite"), ("contrast", math.nan, "be >= 0"), ("cutout", 1.1, r"lie in \[0, 1\]"),
     ("translation", -1.0, r"lie in \[0, 1\]"), ("saturation", math.inf, "be >= 0 and finite")],
)  # fmt: skip
def test_bad_settings_are_told(name: str, value: float, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"augment\.{name} is {value}; it must {allowed}"):
        DiffAugment(**{name: value})
