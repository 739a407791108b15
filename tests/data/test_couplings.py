"""Pairs of noise and image: each is a function of its index, in whatever shards, and faults are named."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imagewright.data import ImageSet, Loader, shards
from imagewright.data.couplings import (
    Couplings,
    Manifest,
    claim_folder,
    mixed,
    read_manifest,
    shard_fault,
    shard_path,
    standing,
    write_shard,
)
from imagewright.locks import alone
from imagewright.noise import ImageNoise
from imagewright.types import DataSpec, UserError

SPEC = DataSpec(name="toy", resolution=4, channels=2, num_classes=3)
MANIFEST = Manifest(n=10, seed=5, shard=4, batch=2, dtype="float32", spec=SPEC, origin={"model": "m"})


def image(i: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 32).view(2, 4, 4) * (i + 1) / 10


def store(folder: Path, manifest: Manifest = MANIFEST) -> Path:
    claim_folder(folder, manifest)
    for index in range(manifest.shards):
        rows = manifest.rows(index)
        images, labels = torch.stack([image(i) for i in rows]), torch.tensor([i % 3 for i in rows])
        write_shard(folder, manifest, index, images, labels)
    return folder


def test_pairs_are_read_by_row_across_shards(tmp_path: Path) -> None:
    pairs = Couplings(store(tmp_path))
    assert len(pairs) == 10 and pairs.manifest.shards == 3 and pairs.spec == SPEC
    rows = [9, 0, 4, 4]
    read = pairs.read(rows)
    assert torch.equal(read.images, torch.stack([image(i) for i in rows]))
    assert read.cond.label is not None and read.cond.label.tolist() == [0, 0, 1, 1]
    for place, i in enumerate(rows):
        assert torch.equal(read.latents[place], ImageNoise(5, [i]).normal(torch.empty(1, 2, 4, 4))[0])
    with pytest.raises(IndexError, match=r"0 \.\. 9"):
        pairs.read([10])


def test_half_the_bytes_cost_half_the_digits(tmp_path: Path) -> None:
    read = Couplings(store(tmp_path, replace(MANIFEST, dtype="float16"))).read([3]).images[0]
    assert read.dtype == torch.float32
    assert 0 < float((read - image(3)).abs().max()) < 5e-4


def test_no_labels_where_there_are_no_classes(tmp_path: Path) -> None:
    pairs = Couplings(store(tmp_path, replace(MANIFEST, spec=replace(SPEC, num_classes=0))))
    assert pairs.read([1]).cond.label is None


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "other rows"])
def test_a_broken_shard_is_named(tmp_path: Path, damage: str) -> None:
    path = shard_path(store(tmp_path), 1)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(shard_path(tmp_path, 0).read_bytes())
    faults = [shard_fault(tmp_path, MANIFEST, i, checksum=True) for i in range(3)]
    words = {"missing": "is missing", "truncated": "not whole", "flipped": "checksum", "other rows": "from pair 0"}
    assert faults[0] is None and faults[2] is None and words[damage] in str(faults[1])
    if damage == "flipped":  # a full read is not made at every start
        assert shard_fault(tmp_path, MANIFEST, 1) is None
    else:
        with pytest.raises(UserError, match=r"shard-000001\.safetensors .*given again, makes what is missing"):
            Couplings(tmp_path)


def test_a_folder_keeps_to_one_set_which_may_grow(tmp_path: Path) -> None:
    store(tmp_path)
    claim_folder(tmp_path, MANIFEST)
    with pytest.raises(UserError, match="couplings with another seed, dtype"):
        claim_folder(tmp_path, replace(MANIFEST, seed=6, dtype="float16"))
    with pytest.raises(UserError, match="holds 10 couplings; --n is 9"):
        claim_folder(tmp_path, replace(MANIFEST, n=9))
    claim_folder(tmp_path, replace(MANIFEST, n=11))
    assert read_manifest(tmp_path).n == 11
    assert "holds images [2, 2, 4, 4]" in str(shard_fault(tmp_path, replace(MANIFEST, n=11), 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"n": 0}, "n is 0"), ({"shard": 0}, "shard is 0"), ({"batch": 0}, "batch is 0"), ({"seed": -1}, "seed is -1"),
     ({"dtype": "int8"}, "allowed: float16, float32")],
)  # fmt: skip
def test_values_out_of_range(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(MANIFEST, **changes)  # type: ignore[arg-type]


def test_folders_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        Couplings(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "imagewright-couplings/1", "n": 3}')
    with pytest.raises(UserError, match="damaged"):
        Couplings(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="has format"):
        Couplings(tmp_path)


def test_batches_bring_as_many_pairs_in_an_order_of_their_own(tmp_path: Path) -> None:
    pixels = np.arange(7 * 4 * 4 * 1, dtype=np.uint8).reshape(7, 4, 4, 1)
    pairs = Couplings(store(tmp_path))
    plain, loader = (Loader(ImageSet.of(pixels), 3, seed=1, xflip=True, couplings=c) for c in (None, pairs))
    assert plain.batch(0).coupling is None
    assert torch.equal(plain.batch(6).images, loader.batch(6).images)
    whole = loader.batch(0, 20).coupling
    assert whole is not None
    for half in (whole.images[:10], whole.images[10:]):  # an epoch has every pair once
        assert sorted((half.flatten(1).amax(1) * 10).round().int().tolist()) == list(range(1, 11))
    assert not torch.equal(whole.images[:10], whole.images[10:])
    later = loader.batch(8, 5).coupling  # the same sequence from any position
    assert later is not None and torch.equal(later.images, whole.images[8:13])
    assert torch.equal(later.latents, whole.latents[8:13])


def test_mirroring_turns_noise_and_image_together(tmp_path: Path) -> None:
    times = (0.75, 0.5)
    whole = replace(MANIFEST, times=times)
    claim_folder(tmp_path, whole)
    for index in range(whole.shards):
        rows = whole.rows(index)
        images = torch.stack([image(i) for i in rows])
        points = torch.stack([images + 1, images + 2], 1)
        write_shard(tmp_path, whole, index, images, torch.tensor([i % 3 for i in rows]), points=points)
    pixels = np.zeros((7, 4, 4, 1), np.uint8)
    plain, flipped = (
        Loader(ImageSet.of(pixels), 3, seed=1, xflip=x, couplings=Couplings(tmp_path)).batch(0, 40).coupling
        for x in (False, True)
    )
    assert plain.times.tolist() == [list(times)] * 40
    turned = [not torch.equal(a, b) for a, b in zip(plain.images, flipped.images, strict=True)]
    assert 8 < sum(turned) < 32
    for name in ("latents", "images", "points"):
        for was, now, turn in zip(getattr(plain, name), getattr(flipped, name), turned, strict=True):
            assert torch.equal(now, was.flip(-1) if turn else was)


def test_mixed_stores_have_their_shares_without_repeats(tmp_path: Path) -> None:
    a, b = Couplings(store(tmp_path / "a")), Couplings(store(tmp_path / "b", replace(MANIFEST, n=6, seed=9)))
    loader = Loader(ImageSet.of(np.zeros((7, 4, 4, 1), np.uint8)), 3, seed=1, couplings=mixed([a, b], (4.0, 1.0)))
    whole = loader.batch(0, 1280).coupling
    noise = {  # whose a pair is, its noise says
        round(float(z.sum()), 4): (store, i)
        for store, pairs in enumerate((a, b))
        for i, z in enumerate(pairs.read(range(len(pairs))).latents)
    }
    found = [noise[round(float(z.sum()), 4)] for z in whole.latents]
    assert sum(store for store, _ in found) == 256
    rows = [[i for store, i in found if store == which] for which in (0, 1)]
    assert all(sorted(rows[0][k : k + 10]) == list(range(10)) for k in range(0, 1020, 10))
    assert all(sorted(rows[1][k : k + 6]) == list(range(6)) for k in range(0, 252, 6))
    later = loader.batch(250, 20).coupling  # across a block, from any position
    assert torch.equal(later.latents, whole.latents[250:270])
    assert torch.equal(later.cond.label, whole.cond.label[250:270])
    alone = Loader(ImageSet.of(np.zeros((7, 4, 4, 1), np.uint8)), 3, seed=1, couplings=mixed([a], ()))
    assert alone.batch(0, 4).coupling.images.shape == (4, 2, 4, 4)


def test_stores_that_do_not_mix(tmp_path: Path) -> None:
    a, b = Couplings(store(tmp_path / "a")), Couplings(store(tmp_path / "b"))
    with pytest.raises(UserError, match="has 3 numbers for 2 stores of pairs"):
        mixed([a, b], (1.0, 1.0, 1.0))
    with pytest.raises(UserError, match="weights must be positive and finite"):
        mixed([a, b], (1.0, 0.0))
    c = Couplings(store(tmp_path / "c", replace(MANIFEST, spec=replace(SPEC, num_classes=0))))
    with pytest.raises(UserError, match="do not mix: their shape and number of classes are"):
        mixed([a, c], ())
    assert mixed([a, b], ()).weights == (0.5, 0.5)


# --- writers that share a folder ------------------------------------------------------------------------------------


def test_of_two_claims_at_once_the_larger_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, writing, written = shards.write_json, threading.Event(), threading.Event()

    def slow(path: Path, value: Any) -> None:
        if value["n"] == 10:
            writing.set()
            written.wait(0.3)  # the larger would be by then, if it did not wait for this one
        write(path, value)
        written.set()

    monkeypatch.setattr(shards, "write_json", slow)
    fewer = threading.Thread(target=claim_folder, args=(tmp_path, MANIFEST))
    fewer.start()
    assert writing.wait(300)  # it has found no manifest, and is about to write one
    claim_folder(tmp_path, replace(MANIFEST, n=30))
    fewer.join()
    assert read_manifest(tmp_path).n == 30


def test_a_manifest_stands_with_the_most_pairs_that_were_asked_for(tmp_path: Path) -> None:
    claim_folder(tmp_path, MANIFEST)
    assert standing(tmp_path, replace(MANIFEST, n=4)).n == 10
    assert standing(tmp_path, replace(MANIFEST, n=40)).n == read_manifest(tmp_path).n == 40


def test_a_lock_that_was_waited_for_is_held(tmp_path: Path) -> None:
    path, inside, leave = tmp_path / "lock", threading.Event(), threading.Event()

    def wait() -> None:
        with alone(path, wait=True):
            inside.set()
            leave.wait()

    waiter = threading.Thread(target=wait, daemon=True)  # which a failure here leaves waiting
    with alone(path) as lock:
        assert lock == "held"
        waiter.start()
        assert not inside.wait(0.2)
    assert inside.wait(300)  # the first holder has removed its file on leaving
    with alone(path) as lock:
        assert lock == "busy"
    leave.set()
    waiter.join()
    with alone(path) as lock:
        assert lock == "held"


def test_where_weights_lay_does_not_count_but_which_they_were(tmp_path: Path) -> None:
    def origin(**entries: str) -> Manifest:
        return replace(
            MANIFEST, origin={"model": "a", "weights_sha256": "1", "guide": "g", "guide_sha256": "2"} | entries
        )

    claim_folder(tmp_path, origin())
    claim_folder(tmp_path, origin(model="./a", guide="/g"))
    for name in ("weights_sha256", "guide_sha256"):
        with pytest.raises(UserError, match="another origin"):
            claim_folder(tmp_path, origin(**{name: "3"}))
