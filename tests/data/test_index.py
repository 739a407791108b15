"""A set is decoded and hashed once: what is kept, when it counts, and that it never passes for another set."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imagewright import cache
from imagewright.data import ImageSet, Loader, index, reading, write_edm_zip
from imagewright.data.fitting import Fitting
from imagewright.data.opening import open_images
from imagewright.data.packed import Digests, Places, Texts
from imagewright.types import UserError

N = 12


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SETTLED", -1.0)  # the sets of a test are younger than two seconds


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each picture that is decoded."""
    counted: list[int] = []
    decode = reading.decode

    def counting(content: bytes) -> np.ndarray:
        counted.append(len(content))
        return decode(content)

    monkeypatch.setattr(reading, "decode", counting)
    return counted


def some(seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)
    return ImageSet.of(pixels, np.arange(N) % 3)


def as_folder(path: Path, seed: int = 0) -> Path:
    with zipfile.ZipFile(write_edm_zip(some(seed), path.with_suffix(".zip"))) as archive:
        archive.extractall(path)
    return path


def same(a: ImageSet, b: ImageSet) -> None:
    for name in ("spec", "names", "source", "captions", "subgroups", "splits", "skipped", "unread", "made"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.names == tuple(b.names) and a.digests == tuple(b.digests) and a.fingerprint == b.fingerprint
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.images(), b.images())
    assert a.subset([5, 1]).names == b.subset([5, 1]).names
    assert a.subset([5, 1]).fingerprint == b.subset([5, 1]).fingerprint
    np.testing.assert_array_equal(a.subset([5, 1]).images(), b.subset([5, 1]).images())


@pytest.mark.parametrize("deflated", [True, False])
@pytest.mark.parametrize("container", ["zip", "folder"])
def test_the_second_opening_decodes_nothing_and_finds_the_same(tmp_path, decoding, container, deflated):
    path = as_folder(tmp_path / "set")
    if container == "zip":
        path = tmp_path / "packed.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as archive:
            for file in sorted((tmp_path / "set").rglob("*")):
                archive.write(file, file.relative_to(tmp_path / "set"))
    first = open_images(path, resolution=2)
    assert len(decoding) == N
    again = open_images(path, resolution=2)
    assert len(decoding) == N and again.fingerprint == first.fingerprint and len(decoding) == N
    same(again, first)
    assert len(decoding) == 2 * N
    again.images()
    assert len(decoding) == 2 * N  # what fits in memory is decoded once
    assert open_images(path).spec.resolution == 4 and len(decoding) == 3 * N  # another way to open it
    a, b = (Loader(s, 5, 0, xflip=True).batch(3).images for s in (first, again))
    assert a.equal(b)


def test_what_opening_refuses_or_leaves_out_is_the_same_again(tmp_path, decoding):
    path = as_folder(tmp_path / "set")
    (path / "00000" / "img00000003.png").write_bytes(b"none")
    for _ in range(2):
        with pytest.raises(UserError, match="1 unusable file"):
            open_images(path)
    first, again = (open_images(path, skip_bad=True) for _ in range(2))
    assert first.skipped == again.skipped and len(again) == N - 1
    same(again, first)


@pytest.mark.parametrize("change", ["content", "removed", "added", "label", "renamed", "touched"])
def test_any_change_makes_the_set_be_read_anew(tmp_path, decoding, change):
    path = as_folder(tmp_path / "set")
    first = open_images(path)
    one, meta = path / "00000" / "img00000003.png", path / "dataset.json"
    if change == "content":
        content = as_folder(tmp_path / "other", seed=1).joinpath("00000", "img00000003.png").read_bytes()
        before = one.stat()
        one.write_bytes(content)
        os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar leave it
    elif change == "removed":
        one.unlink()
        meta.unlink()
    elif change == "added":
        (path / "00000" / "more.png").write_bytes(one.read_bytes())
        meta.unlink()
    elif change == "label":
        meta.write_text(meta.read_text().replace('img00000003.png", 0]', 'img00000003.png", 2]'))
    elif change == "renamed":
        one.rename(one.with_name("img10000003.png"))
        meta.unlink()
    else:
        os.utime(one)
    then = open_images(path)
    assert len(decoding) >= 2 * N - 1
    assert (then.fingerprint == first.fingerprint) == (change == "touched")


@pytest.mark.parametrize("container", ["zip", "folder"])
def test_a_picture_that_changed_unnoticed_is_an_error_and_never_another_picture(tmp_path, monkeypatch, container):
    """As on a disk that keeps no times: the stamp is the same, the picture is not."""
    path = as_folder(tmp_path / "set") if container == "folder" else write_edm_zip(some(), tmp_path / "set.zip")
    stamp = index._stamp(path)
    monkeypatch.setattr(index, "_stamp", lambda path: stamp)
    first = open_images(path)
    if container == "folder":
        as_folder(tmp_path / "set", seed=1)
    else:
        write_edm_zip(some(1), path)
    changed = open_images(path)
    assert changed.fingerprint == first.fingerprint
    with pytest.raises(
        UserError, match=r"another picture than when .* first opened|no longer is.*; the set will be read"
    ):
        changed.images([3])
    assert open_images(path).fingerprint != first.fingerprint


def test_what_changed_just_now_is_not_kept(tmp_path, decoding, monkeypatch):
    monkeypatch.setattr(index, "SETTLED", 3600.0)  # longer than any machine takes from here to the opening
    path = write_edm_zip(some(), tmp_path / "set.zip")
    open_images(path)
    open_images(path)
    assert len(decoding) == 2 * N


def test_without_a_cache_all_is_as_it_was(tmp_path, decoding, monkeypatch):
    path = write_edm_zip(some(), tmp_path / "set.zip")
    (tmp_path / "file").write_text("")
    for where in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        monkeypatch.setenv("IMAGEWRIGHT_CACHE", where)
        assert cache.cache_folder() is None
        assert len(open_images(path)) == N
    assert len(decoding) == 3 * N and sorted(p.name for p in tmp_path.iterdir()) == ["file", "set.zip"]


@pytest.mark.parametrize("damage", [b"", b"none", None])
def test_a_damaged_entry_is_made_anew(tmp_path, decoding, damage):
    path = write_edm_zip(some(), tmp_path / "set.zip")
    open_images(path)
    (entry,) = (tmp_path / "cache").glob("index-*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-9] if damage is None else damage)
    open_images(path)
    open_images(path)
    assert len(decoding) == 2 * N


def test_a_process_that_comes_meanwhile_waits_and_decodes_nothing(tmp_path):
    path = write_edm_zip(some(), tmp_path / "set.zip")
    program = (
        "import sys; from imagewright.data import index, reading, open_images; index.SETTLED = -1.0\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "reading.decode = None\n"
        "print(open_images(sys.argv[1]).fingerprint)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", program, str(path)], **pipes)
    assert other.stdout.readline() == "ready\n"
    entry = index.Entry(path, Fitting(None, None), False, True)
    assert entry.recall() is None  # from here on the other one waits
    other.stdin.write("go\n")
    other.stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.3)
    images, archive = some(), index.open_archive(path)
    entry.keep(images, archive, archive.pictures)
    del entry
    assert other.communicate()[0].strip() == images.fingerprint and other.returncode == 0


def test_opening_costs_neither_work_nor_memory_for_each_picture(tmp_path, monkeypatch):
    """200,000 pictures that are not there: what their index says is mapped, not read."""
    monkeypatch.setattr(index.limits, "KEPT", 0)
    path, n = write_edm_zip(some(), tmp_path / "set.zip"), 200_000
    archive, zeros = index.open_archive(path), np.zeros(n, np.int64)
    monkeypatch.setattr(
        type(archive.read),
        "places",
        lambda *_: Places((str(path),), zeros, zeros, zeros, zeros, zeros.astype(np.uint8)),
    )
    names, digests = Texts.of([f"{i:08d}.png" for i in range(n)]), Digests(np.zeros((n, 32), np.uint8))
    images = replace(some(), labels=zeros, names=names, digests=digests)
    index.Entry(path, Fitting(None, None), False, True).keep(images, archive, names)
    calls = Counter[str]()
    tracemalloc.start()
    sys.setprofile(lambda frame, event, arg: calls.update([event]))
    found = open_images(path)
    sys.setprofile(None)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == n and found.names[n - 1] == "00199999.png" and not found.in_memory
    assert most < 1e6 and calls.total() < n / 10


def test_readers_go_to_other_processes(tmp_path):
    path = write_edm_zip(some(), tmp_path / "set.zip")
    first, again = open_images(path), open_images(path)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(again.pixels))(np.array([3, 1])), first.images([3, 1]))


def test_packed_texts_and_checksums_are_sequences():
    words = ["", "a", "é\udce9", "", "bc"]
    texts = Texts.of(words)
    assert texts == words and list(texts) == words and texts[-1] == "bc" and texts[1:3] == ("a", words[2])
    assert texts.pick(np.array([4, 0, 2])) == ["bc", "", words[2]] and texts.pick(np.array([], int)) == ()
    assert Texts.of([]) == () and texts != words[:-1]
    digests = Digests(np.arange(96, dtype=np.uint8).reshape(3, 32))
    assert digests[1] == bytes(range(32, 64)) and digests.pick(np.array([2]))[0] == digests[2]
    with pytest.raises(IndexError):
        texts[5]
