"""Masking schedules: ends, order, means."""

from __future__ import annotations

import pytest
import torch

from imagewright.paths.mask_ratios import MASK_RATIOS, check_ratio, mask_ratio
from imagewright.types import UserError

R = torch.linspace(0, 1, 101, dtype=torch.float64)


@pytest.mark.parametrize("name", MASK_RATIOS)
def test_every_schedule_falls_from_all_to_none(name: str) -> None:
    ratio = mask_ratio(name, R, 256)
    assert float(ratio[0]) == pytest.approx(1, abs=1 / 256 + 1e-12)
    assert float(ratio[-1]) == 1e-6  # the published bound: never nothing at all
    assert (ratio.diff() <= 0).all() and ratio.min() >= 1e-6 and ratio.max() <= 1


def test_concave_schedules_lie_above_the_straight_line_and_convex_ones_below() -> None:
    line = mask_ratio("linear", R, 256)[1:-1]
    for name in ("cosine", "square", "cubic"):
        assert (mask_ratio(name, R, 256)[1:-1] > line).all(), name
    for name in ("sqrt", "log"):
        assert (mask_ratio(name, R, 256)[10:-1] < line[9:]).all(), name


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("cosine", 0.8910065241883679),
        ("cubic", 0.973),
        ("square", 0.91),
        ("linear", 0.7),
        ("sqrt", 0.4522774424948339),
        ("log", 0.2171206992707758),
        ("exp", 0.9793826888941736),
    ],
)
def test_shares_are_the_released_programs(name: str, official: float) -> None:
    """`mask_schedule.schedule(0.3, 256, ...)` of google-research/maskgit, its powers being 3, 2 and 1/2."""
    found = mask_ratio(name, torch.tensor([0.3], dtype=torch.float64), 256)
    assert float(found) == pytest.approx(official, rel=1e-12)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(UserError, match=r"sampler\.schedule is 'cosin'; it must be one of cosine"):
        check_ratio("sampler.schedule", "cosin")
