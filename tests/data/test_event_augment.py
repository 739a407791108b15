"""What is made of events and their frames before an encoder sees them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imagewright.data.event_augment import (
    blurred,
    copied,
    cropped,
    histogram,
    mirrored,
    normalised,
    recoloured,
    shifted,
    turned,
    without_hot_pixels,
)
from imagewright.noise import BatchNoise

SIDE = 16


def noise(n: int = 3, step: int = 0, first: int = 0) -> BatchNoise:
    return BatchNoise(0, step, range(first, first + n), 8)


def events(n: int = 3, most: int = 400, there: int = 300) -> Tensor:
    """Sorted by time, the last rows empty."""
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randint(SIDE, (n, most), generator=draw) for _ in "xy")
    t = torch.arange(most).double().expand(n, -1) / most
    p = 2 * torch.randint(2, (n, most), generator=draw) - 1
    p[:, there:] = 0
    return torch.stack([x.double(), y.double(), t, p.double()], -1)


def test_a_histogram_counts_every_event_once() -> None:
    given = events()
    counts = histogram(given, SIDE)
    assert counts.shape == (3, 2, SIDE, SIDE) and counts.sum((1, 2, 3)).tolist() == [300] * 3
    x, y, _, p = given[1, 7].tolist()
    same = (given[1, :, 0] == x) & (given[1, :, 1] == y) & (given[1, :, 3] == p)
    assert counts[1, 0 if p > 0 else 1, int(y), int(x)] == same.sum()
    half = given + torch.tensor([0.9, 0.9, 0, 0])
    assert torch.equal(histogram(half, SIDE), counts)  # places are rounded down


def test_time_turned_twice_is_as_it_was_and_once_swaps_the_channels() -> None:
    given, all_of_them = events(), torch.ones(3, dtype=torch.bool)
    once = turned(given, all_of_them)
    torch.testing.assert_close(turned(once, all_of_them), given, atol=1e-12, rtol=0)
    assert torch.equal(histogram(once, SIDE), histogram(given, SIDE).flip(1))
    there = once[..., 3] != 0
    assert (once[0, there[0], 2].diff() > 0).all()
    some = turned(given, torch.tensor([True, False, False]))
    assert torch.equal(some[1:], given[1:]) and torch.equal(some[0], once[0])


def test_what_is_shifted_out_of_the_frame_is_dropped() -> None:
    given = events()
    by = torch.tensor([[3, -2], [0, 0], [20, 0]])
    counts, before = histogram(shifted(given, by, SIDE), SIDE), histogram(given, SIDE)
    assert torch.equal(counts[0, :, :-2, 3:], before[0, :, 2:, :-3]) and not counts[0, :, -2:].any()
    assert torch.equal(counts[1], before[1]) and not counts[2].any()


def test_copies_are_so_many_and_near() -> None:
    given = events()
    made = copied(given, (100, 200), 300, noise())
    assert torch.equal(made[:, :400], given)
    added = (made[:, 400:, 3] != 0).sum(1)
    assert ((added >= 100) & (added < 200)).all() and len(set(added.tolist())) > 1
    away = (made[:, 400:] - given)[made[:, 400:, 3] != 0]
    assert 0.9 < away[:, 0].std() < 1.6 and away[:, 2].std() == pytest.approx(1e-3, rel=0.2) and (away[:, 3] == 0).all()
    place = made[:, 400:][made[:, 400:, 3] != 0][:, :2]
    assert place.min() == 0 and place.max() <= SIDE - 1
    assert torch.equal(copied(given, (100, 200), 301, noise())[..., 3].abs().sum(1), torch.full((3,), 300.0).double())
    few = copied(given[:, :50], (100, 5000), 1, noise())  # as many as there are, less one
    assert (few[:, 50:, 3] != 0).sum(1).tolist() == [49] * 3


def test_draws_are_the_examples_own() -> None:
    given = events().float()
    whole, last = copied(given, (100, 200), 1, noise()), copied(given[2:], (100, 200), 1, noise(1, first=2))
    assert torch.equal(whole[2:], last)
    frames = normalised(histogram(whole, SIDE))
    assert torch.equal(cropped(frames, 0.3, noise())[2:], cropped(frames[2:], 0.3, noise(1, first=2)))


def test_blur_moves_by_whole_pixels() -> None:
    given = events()
    moved = blurred(given, 1.0, SIDE, noise())
    inside = moved[..., 3] != 0
    assert torch.equal(moved[inside], moved[inside].where(torch.arange(4) == 2, moved[inside].round()))
    assert 0.7 < (moved - given)[inside][:, 0].std() < 1.3 and inside.sum() < 900
    assert blurred(given, 0.0, SIDE, noise()) is given


def test_frames_are_within_their_range() -> None:
    counts = torch.zeros(2, 2, 4, 4)
    counts[0, 0, 1, 1], counts[0, 1, 2, 2], counts[0, 1, 3, 3] = 9, 1, 3
    frames = normalised(counts)
    assert frames[0, 0, 1, 1] == pytest.approx(0.8) and frames[0, 1, 2, 2] == -0.5 and (frames[1] == -1).all()
    cut = without_hot_pixels(counts)
    assert cut[0].max() == pytest.approx(13 / 3) and cut[0, 1, 2, 2] == 1 and cut[0, 1, 3, 3] == 3 and not cut[1].any()
    changed = recoloured(counts, 0.5, noise(2))
    assert (changed >= 0).all() and not changed[counts == 0].any() and (changed != counts)[counts > 0].all()


def test_a_rectangle_is_enlarged_without_new_counts() -> None:
    n = 200
    ramp = torch.arange(SIDE * SIDE).view(1, 1, SIDE, SIDE).expand(n, 2, -1, -1).double()
    found = cropped(ramp, 0.3, BatchNoise(0, 0, range(n), n))
    rows, columns = (found // SIDE)[:, 0, :, 0], (found % SIDE)[:, 0, 0]
    assert torch.equal(found[:, 0], SIDE * rows[:, :, None] + columns[:, None])
    high, wide = (v[:, -1] - v[:, 0] + 1 for v in (rows, columns))
    share = high * wide / SIDE**2
    assert 0.2 < share.min() < 0.4 and share.max() > 0.9 and (rows.diff() >= 0).all() and (columns.diff() >= 0).all()
    ratio = (wide / high).log()
    assert ratio.min() < -0.1 and ratio.max() > 0.1 and ratio.abs().max() < 0.6
    assert cropped(ramp, 1, noise()) is ramp


def test_half_of_the_frames_are_mirrored() -> None:
    ramp = torch.arange(4.0).expand(400, 1, 4, 4)
    found = mirrored(ramp, BatchNoise(0, 0, range(400), 400))
    turned_ = (found == ramp.flip(3)).all((1, 2, 3))
    assert 160 < turned_.sum() < 240 and torch.equal(found[~turned_], ramp[~turned_])
