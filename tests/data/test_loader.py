"""The order of training images: a function of the seed and the position, whatever the batches."""

import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imagewright.data import ImageSet, Loader, from_uint8, opening, to_uint8, write_edm_zip
from imagewright.data.loader import AHEAD, Turns
from imagewright.data.opening import open_images
from imagewright.types import UserError

N = 7


def numbered(n: int = N, labels: bool = True) -> ImageSet:
    """Pictures whose upper left pixel is their index and whose upper right one is 255."""
    pixels = np.zeros((n, 4, 4, 1), dtype=np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, -1, 0] = np.arange(n), 255
    return ImageSet.of(pixels, np.arange(n) % 3 if labels else None)


def drawn(loader: Loader, position: int, size: int) -> tuple[list[int], list[bool]]:
    row = to_uint8(loader.batch(position, size).images)[:, 0, :, 0].astype(int)
    flipped = row[:, 0] == 255
    return np.where(flipped, row[:, -1], row[:, 0]).tolist(), flipped.tolist()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 9),
    position=st.integers(0, 50),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
)
def test_any_cutting_into_batches_gives_one_sequence(seed, position, sizes):
    images = numbered()
    whole = drawn(Loader(images, 1, seed, xflip=True), position, sum(sizes))
    parts: tuple[list[int], list[bool]] = ([], [])
    for size in sizes:
        fresh = drawn(Loader(images, 5, seed, xflip=True), position + len(parts[0]), size)
        parts = (parts[0] + fresh[0], parts[1] + fresh[1])
    assert parts == whole


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    images = numbered(50)
    order = np.array(drawn(Loader(images, 50, 0), 0, 150)[0]).reshape(3, 50)
    assert (np.sort(order) == np.arange(50)).all()
    assert len({tuple(epoch) for epoch in order}) == 3
    assert drawn(Loader(images, 50, 1), 0, 50)[0] != order[0].tolist()


def test_the_first_order_is_numpys_permutation_of_seed_and_epoch():
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((3, 2, 0))))
    assert drawn(Loader(numbered(), N, 3), 2 * N, N)[0] == generator.permutation(N).tolist()


def test_half_of_the_pictures_are_mirrored_and_only_when_asked():
    images = numbered(200)
    flips = np.array(drawn(Loader(images, 8, 0, xflip=True), 0, 4000)[1])
    assert abs(flips.mean() - 0.5) < 0.05
    per_picture = flips.reshape(20, 200)
    assert (per_picture[0] != per_picture[1]).any()
    assert not any(drawn(Loader(images, 8, 0), 0, 400)[1])


def test_a_mirrored_picture_is_turned_in_whole():
    rng = np.random.default_rng(0)
    images = ImageSet.of(rng.integers(0, 256, (N, 4, 4, 3), dtype=np.uint8))
    plain, flipped = (Loader(images, N, 5, xflip=x).batch(0).images for x in (False, True))
    turned = [not torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert any(turned) and not all(turned)
    for a, b, turn in zip(plain, flipped, turned, strict=True):
        assert torch.equal(b, a.flip(-1) if turn else a)


def test_a_batch_is_float32_nchw_with_the_pictures_own_labels():
    images = numbered()
    batch = Loader(images, 6, 0).batch(4)
    assert batch.images.shape == (6, 1, 4, 4)
    assert batch.images.dtype == torch.float32
    assert batch.cond.label is not None and batch.cond.label.dtype == torch.int64
    index = to_uint8(batch.images)[:, 0, 0, 0].astype(int)
    assert batch.cond.label.tolist() == [images.labels[i] for i in index]
    assert Loader(numbered(labels=False), 6, 0).batch(0).cond.label is None


def test_a_batch_stays_on_the_device_for_which_it_was_read():
    """No picture goes back to the host, which would not wait for it and read what lay there before."""
    loader = Loader(numbered(), 6, 0)
    loader.follow(Turns(stride=6, first=0, count=1, size=6), "meta")
    batch = loader.batch(0)
    assert batch.images.device.type == batch.cond.label.device.type == "meta"


def test_loading_does_not_change_the_set():
    images = numbered()
    before = images.images()
    Loader(images, 64, 0, xflip=True).batch(0)
    np.testing.assert_array_equal(images.images(), before)


def test_a_set_decoded_on_demand_gives_the_same_batches(tmp_path, monkeypatch):
    path = write_edm_zip(numbered(), tmp_path / "set.zip")
    kept = open_images(path)
    monkeypatch.setattr(opening, "KEEP_DECODED", 0)
    lazy = open_images(path)
    assert kept.in_memory and not lazy.in_memory
    assert kept.fingerprint == lazy.fingerprint
    a, b = (Loader(s, 4, 0, xflip=True) for s in (kept, lazy))
    for position in (
        0,
        4,
        8,
        12,
        3,
        3,
        20,
    ):  # in stride, then jumping, so that guesses ahead are right and wrong
        assert torch.equal(a.batch(position).images, b.batch(position).images)
    half = lazy.subset([5, 1])
    np.testing.assert_array_equal(half.images(), kept.images([5, 1]))
    np.testing.assert_array_equal(half.images([1]), kept.images([1]))


class Counting:
    """A reader that notes every row it reads."""

    def __init__(self, images: ImageSet) -> None:
        self.images, self.read = images, []

    def __call__(self, rows):
        self.read.extend(rows.tolist())
        return self.images.images(rows)


def on_demand(images: ImageSet) -> tuple[ImageSet, Counting]:
    counting = Counting(images)
    return replace(images, pixels=counting), counting


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_no_picture_is_decoded_twice_or_in_vain(world, count):
    images, size, steps = numbered(), 2, 3
    batch = size * count * world
    seen = []
    for rank in range(world):
        turned, counting = on_demand(images)
        loader = Loader(turned, batch, 0, xflip=True)
        loader.follow(Turns(stride=batch, first=rank * count * size, count=count, size=size, end=steps * batch - 1))
        for step in range(steps):
            for j in range(rank * count, (rank + 1) * count):
                seen += [(step * batch + j * size, drawn(loader, step * batch + j * size, size))]
        assert len(counting.read) == steps * count * size
    whole = drawn(Loader(images, 1, 0, xflip=True), 0, steps * batch)
    for position, (rows, flips) in seen:
        assert (rows, flips) == (whole[0][position : position + size], whole[1][position : position + size])


def test_the_next_batches_are_decoded_before_they_are_asked_for():
    turned, counting = on_demand(numbered())
    loader = Loader(turned, 2, 0)
    loader.batch(0)
    loader._pool.submit(lambda: None).result()
    assert len(counting.read) == 2 + 2 * AHEAD
    loader.batch(40)  # a jump: what was read ahead is forgotten, and never handed out
    assert drawn(loader, 2, 2) == drawn(Loader(numbered(), 2, 0), 2, 2)


def test_a_batch_of_a_large_set_costs_what_one_of_a_small_set_does():
    """Of 2,000,000 pictures against 20,000: no copy of the permutation, no arange(N). Its memory, in bytes."""

    def most(n: int) -> int:
        nothing = ImageSet.of(np.zeros((1, 2, 2, 1), np.uint8))
        labels = np.full(n, -1)
        loader = Loader(
            replace(nothing, labels=labels, pixels=lambda rows: np.zeros((len(rows), 2, 2, 1), np.uint8)), 64, 0
        )
        loader.batch(0)
        loader._pool.submit(lambda: None).result()  # what is read ahead falls before the count, or into it
        tracemalloc.start()
        loader.batch(64)
        loader._pool.submit(lambda: None).result()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert most(2_000_000) < 2 * most(20_000) < 500_000


def test_other_processes_decode_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "KEEP_DECODED", 0)
    images = open_images(write_edm_zip(numbered(), tmp_path / "set.zip"))
    assert not images.in_memory
    a, b = Loader(images, N, 0), Loader(images.subset(range(N)), N, 0, workers=1)
    assert torch.equal(a.batch(4).images, b.batch(4).images)
    (tmp_path / "set.zip").write_bytes(write_edm_zip(numbered(2), tmp_path / "other.zip").read_bytes())
    with pytest.raises(UserError, match="usable when opened and no longer is: no longer in the zip"):
        pickle.loads(pickle.dumps(images.pixels))(np.array([5]))


def test_senseless_requests_are_refused():
    images = numbered()
    with pytest.raises(UserError, match="batch size is 0"):
        Loader(images, 0, 0)
    with pytest.raises(UserError, match="data seed is -1"):
        Loader(images, 1, -1)
    with pytest.raises(UserError, match="no pictures"):
        Loader(images.subset([]), 1, 0)
    with pytest.raises(ValueError, match="position is -1"):
        Loader(images, 1, 0).batch(-1)


def test_bytes_survive_the_way_to_minus_one_and_one():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    scaled = from_uint8(every)
    assert (scaled.min(), scaled.max()) == (-1, 1)
    assert torch.equal(scaled.ravel(), torch.arange(256) / 127.5 - 1)
    np.testing.assert_array_equal(to_uint8(scaled), every)


def test_to_uint8_clamps_rounds_half_up_and_refuses_nan():
    values = torch.tensor([-torch.inf, -3.0, 0.0, 1.001, torch.inf]).view(1, 1, 1, -1)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(values.to(torch.bfloat16)).dtype == np.uint8
    with pytest.raises(UserError, match="1 of 2 images contain NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]).view(2, 1, 1, 1))
