"""Shards of tar files: read by place, in the loader's own order, from a disk or a store."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest

from imagewright.data import Loader, index, opening, write_edm_zip
from imagewright.data.opening import open_images
from imagewright.data.pixels import encode_png
from imagewright.types import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SETTLED", -1.0)


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def sample(i: int, **more: bytes) -> dict[str, bytes]:
    return {f"{i:04d}.png": encode_png(PIXELS[i]), f"{i:04d}.cls": str(i % 3).encode()} | {
        f"{i:04d}.{kind}": content for kind, content in more.items()
    }


def shards(folder: Path) -> Path:
    """Three shards of three samples."""
    folder.mkdir()
    for k in range(3):
        files = {
            name: content for i in range(3 * k, 3 * k + 3) for name, content in sample(i, txt=b"no. %d" % i).items()
        }
        (folder / f"train-{k:03d}.tar").write_bytes(packed(files))
    return folder


def test_shards_are_one_set_with_classes_and_captions(tmp_path):
    for images in (open_images(shards(tmp_path / "set")), open_images(tmp_path / "set")):  # read, then from its index
        np.testing.assert_array_equal(images.images(), PIXELS)
        np.testing.assert_array_equal(images.labels, np.arange(9) % 3)
        assert images.names[4] == "train-001.tar/0004.png" and images.captions[4] == "no. 4"
        assert images.spec.num_classes == 3
    assert open_images(tmp_path / "set", labels=False).spec.num_classes == 0
    one = open_images(tmp_path / "set" / "train-002.tar")
    np.testing.assert_array_equal(one.images(), PIXELS[6:])


def test_training_goes_on_in_mid_shard_in_the_order_of_any_other_container(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "KEEP_DECODED", 0)
    plain = open_images(write_edm_zip(open_images(shards(tmp_path / "set")), tmp_path / "set.zip"))
    for _ in range(2):
        tars = open_images(tmp_path / "set")
        assert tars.fingerprint == plain.fingerprint
        for position in (0, 4, 13):  # each from a loader that knows nothing of the batches before
            a, b = (Loader(images, 4, 7, xflip=True).batch(position) for images in (tars, plain))
            assert a.images.equal(b.images) and a.cond.label.equal(b.cond.label)


def test_a_store_is_read_by_url_and_in_ranges(tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe({f"/shelf/{file.name}": file.read_bytes() for file in shards(tmp_path / "set").iterdir()})
    asked = []
    read = type(store).cat_file

    def ranged(self, path, start=None, end=None, **more):
        asked.append(end - start)
        return read(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(store), "cat_file", ranged)
    for _ in range(2):
        images = open_images("memory://shelf/train-*.tar")
        np.testing.assert_array_equal(images.images(), PIXELS)
        np.testing.assert_array_equal(images.labels, np.arange(9) % 3)
    assert max(asked) < 600  # of shards of 10,240
    asked.clear()
    images.images([4])
    assert asked == []  # decoded once
    store.pipe("/shelf/train-001.tar", packed(sample(8)))
    changed = open_images("memory://shelf/train-*.tar")
    assert len(changed) == 7
    store.rm("/shelf", recursive=True)
    for url, sentence in (
        ("memory://shelf/none.tar", "cannot be read"),
        ("memory://shelf/*.tar", "stands for no file"),
        ("nonesuch://shelf/a.tar", "cannot be read: .*nonesuch"),
        ("memory://shelf/pictures.zip", "a URL has to end in .tar"),
    ):
        with pytest.raises(UserError, match=sentence):
            open_images(url)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"none", "no readable tar"),
        (packed(sample(0))[:700], "no readable tar|holds no pictures|ends too early|unusable"),
        (packed({"a.txt": b""}), "holds no pictures"),
        (packed({"a.png": encode_png(PIXELS[0]), "a.cls": b"one"}), "its class is 'one'; it must be a whole number"),
        (packed({"a.png": encode_png(PIXELS[0]), "b.png": b"", "b.cls": b"1"}), "a.png: has no .cls beside it"),
        (packed({"../a.png": encode_png(PIXELS[0])}), "its name leads out of the archive"),
    ],
)
def test_what_is_wrong_with_a_tar_is_told(tmp_path, content, sentence):
    path = tmp_path / "set.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_images(path)
    path.rename(tmp_path / "set.tar.gz")
    with pytest.raises(UserError, match="compressed tar"):
        open_images(tmp_path / "set.tar.gz")


def test_folders_of_one_tar_are_classes(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(packed({f"{'ab'[i % 2]}/{i}.png": encode_png(PIXELS[i]) for i in range(4)}))
    images = open_images(path)
    assert images.spec.class_names == ("a", "b") and images.labels.tolist() == [0, 0, 1, 1]
