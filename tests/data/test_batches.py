"""CIFAR and downsampled ImageNet as published: pickles of both Pythons, binary files, npz; and what a pickle hides."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewright.data import batches, convert, open_images
from imagewright.data.clsloc import ALPHABETICAL, CLSLOC
from imagewright.data.numpy_pickle import read_arrays
from imagewright.types import UserError

ROWS = np.random.default_rng(0).integers(0, 256, (12, 3072), dtype=np.uint8)
PICTURES = ROWS.reshape(12, 3, 32, 32).transpose(0, 2, 3, 1)
LABELS = [3, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def python2(batch: dict[str, Any]) -> bytes:
    """Bytes as Python 2's cPickle (protocol 2) wrote CIFAR's: byte strings, and the array's data as one of them."""

    def text(words: str) -> bytes:
        return b"U" + bytes([len(words)]) + words.encode()

    data: np.ndarray = batch["data"]
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85" + text("b") + b"\x87R("
    array += b"K\x01K" + bytes([data.shape[0]]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    array += b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R(K\x03" + text("|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"\x89T" + struct.pack("<i", data.nbytes) + data.tobytes() + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([v]) for v in batch["labels"]) + b"e"
    return b"\x80\x02}(" + text("labels") + labels + text("data") + array + b"u."


def test_the_hand_made_python_2_pickle_is_one() -> None:
    loaded = pickle.loads(python2({"data": ROWS[:2], "labels": [1, 2]}), encoding="latin1")  # our own bytes
    assert np.array_equal(loaded["data"], ROWS[:2]) and loaded["labels"] == [1, 2]


def cifar10(folder: Path, write: Callable[[dict[str, Any]], bytes]) -> Path:
    folder.mkdir(parents=True)
    for k in range(5):
        rows = slice(2 * k, 2 * k + 2)
        (folder / f"data_batch_{k + 1}").write_bytes(write({"data": ROWS[rows], "labels": LABELS[rows]}))
    (folder / "test_batch").write_bytes(write({"data": ROWS[10:], "labels": LABELS[10:]}))
    names = ["airplane", *"abcdefgh", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    return folder


def check_cifar10(path: Path) -> None:
    images = open_images(path, split="all")
    assert np.array_equal(images.images(), PICTURES) and images.labels.tolist() == LABELS
    assert images.spec.num_classes == 10 and images.spec.class_names in ((), ("airplane", *"abcdefgh", "truck"))
    assert len(open_images(path)) == 10 and open_images(path, split="test").labels.tolist() == [8, 9]


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_cifar10_pickled(tmp_path: Path, protocol: int) -> None:
    folder = cifar10(tmp_path / "cifar-10-batches-py", lambda d: pickle.dumps(d, protocol=protocol))
    if protocol == 0:  # in letters, as nobody published it
        with pytest.raises(UserError, match="data_batch_1 was refused: it uses the pickle operation"):
            open_images(folder)
        return
    check_cifar10(folder)


def test_cifar10_of_python_2_in_all_containers(tmp_path: Path) -> None:
    folder = cifar10(tmp_path / "set/cifar-10-batches-py", python2)
    check_cifar10(folder)
    check_cifar10(folder.parent)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    check_cifar10(tmp_path / "cifar-10-python.tar.gz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        for file in folder.iterdir():
            zipped.write(file, f"deep/{file.name}")
    check_cifar10(tmp_path / "a.zip")


def test_cifar10_binary(tmp_path: Path) -> None:
    for k in range(6):
        rows = np.concatenate([np.array(LABELS, np.uint8)[2 * k : 2 * k + 2, None], ROWS[2 * k : 2 * k + 2]], 1)
        (tmp_path / ("test_batch.bin" if k == 5 else f"data_batch_{k + 1}.bin")).write_bytes(rows.tobytes())
    (tmp_path / "batches.meta.txt").write_text("airplane\na\nb\nc\nd\ne\nf\ng\nh\ntruck\n\n")
    check_cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(b"x" * 3074)
    with pytest.raises(UserError, match=r"data_batch_1\.bin has 3074 bytes, no whole number of records of 3073"):
        open_images(tmp_path)


def test_cifar100_in_both_versions(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(100)]
    python, binary = tmp_path / "python", tmp_path / "binary"
    python.mkdir(), binary.mkdir()
    for split, rows in (("train", slice(0, 8)), ("test", slice(8, 12))):
        known = {"data": ROWS[rows], "fine_labels": [v + 90 for v in LABELS[rows]], "coarse_labels": LABELS[rows]}
        (python / split).write_bytes(pickle.dumps(known, protocol=2))
        labels = np.stack([np.array(known["coarse_labels"]), np.array(known["fine_labels"])], 1).astype(np.uint8)
        (binary / f"{split}.bin").write_bytes(np.concatenate([labels, ROWS[rows]], 1).tobytes())
    (python / "meta").write_bytes(pickle.dumps({"fine_label_names": names, "coarse_label_names": []}, protocol=2))
    (binary / "fine_label_names.txt").write_text("\n".join(names))
    one, other = (open_images(p, split="all") for p in (python, binary))
    assert one.fingerprint == other.fingerprint and one.spec.class_names == other.spec.class_names == tuple(names)
    assert one.labels.tolist() == [v + 90 for v in LABELS] and one.splits == ("train",) * 8 + ("test",) * 4


def imagenet(folder: Path, kind: str) -> Path:
    folder.mkdir()
    mean = ROWS[:9].mean(0)
    for name, rows in (
        ("train_data_batch_2", slice(4, 9)),
        ("train_data_batch_1", slice(0, 4)),
        ("val_data", slice(9, 12)),
    ):
        labels = [100 * v + 1 for v in LABELS[rows]]
        batch = {"data": ROWS[rows], "labels": labels} | ({"mean": mean} if "train" in name else {})
        if kind == "npz":
            np.savez(folder / f"{name}.npz", **batch)
        else:
            (folder / name).write_bytes(pickle.dumps(batch))
    return folder


@pytest.mark.parametrize("kind", ["npz", "pickle"])
def test_downsampled_imagenet(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = imagenet(tmp_path / "set", kind)
    images = open_images(folder, split="all")
    assert np.array_equal(images.images(), PICTURES) and images.labels.tolist() == [100 * v for v in LABELS]
    assert images.splits == ("train",) * 9 + ("val",) * 3 and images.spec.class_names == CLSLOC
    assert open_images(folder, labels=False).spec.num_classes == 0
    monkeypatch.setattr(batches.limits, "KEPT", 1000)
    read = open_images(folder, split="all", resolution=16, channels=1)
    monkeypatch.setattr(batches.limits, "KEPT", 1 << 30)
    kept = open_images(folder, split="all", resolution=16, channels=1)
    order = np.array([11, 0, 5, 3, 11])
    assert not read.in_memory and kept.in_memory and read.fingerprint == kept.fingerprint
    assert np.array_equal(read.images(order), kept.images(order))
    convert(folder, tmp_path / "a.zip")
    assert open_images(tmp_path / "a.zip", split="val").fingerprint == open_images(folder, split="val").fingerprint


def test_the_order_of_the_development_kit() -> None:
    assert len(set(CLSLOC)) == 1000 and CLSLOC[:3] == ("n02119789", "n02100735", "n02110185")
    assert sorted(ALPHABETICAL) == list(range(1000)) and sorted(CLSLOC)[ALPHABETICAL[0]] == CLSLOC[0]


# --- what a pickle must not do --------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/imagewright-was-executed",)


class Nested:
    def __reduce__(self) -> Any:
        return np.dtype, (Evil(),)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps({"data": Evil()}), "it asks for posix.mkdir"),
        (pickle.dumps({"data": Nested()}), "it asks for posix.mkdir"),
        (pickle.dumps({"data": np.array([Evil()], dtype=object)}), "no plain number type|asks for"),
        (pickle.dumps({"data": np.zeros(3, "V400")}), "no plain number type"),
        (pickle.dumps([1, 2]), "it applies the end to a list"),
        (python2({"data": ROWS[:2], "labels": [1]}).replace(b"K\x02M", b"K\xffM"), r"an array of shape \(255, 3072\)"),
        (b"\x80\x04" + b"\x8e" + struct.pack("<Q", 1 << 60) + b".", "data_batch_1 is no readable pickle of arrays"),
        (b"", "data_batch_1 is no readable pickle of arrays"),
        (pickle.dumps({"data": ROWS[:2, :3000], "labels": [1, 2]}), "`data` must be uint8"),
        (pickle.dumps({"data": ROWS[:2]}), "must have 2 whole numbers under 'labels'"),
        (pickle.dumps({"data": ROWS[:2], "labels": [1, 10]}), r"labels must lie in 0 \.\. 9"),
    ],
)
def test_what_is_no_batch_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_images(tmp_path)
    assert not Path("/tmp/imagewright-was-executed").exists()


def test_arrays_in_every_order_of_bytes_and_axes() -> None:
    wanted = {"a": np.arange(6, dtype=">i4").reshape(2, 3), "b": np.asfortranarray(np.eye(3)[:2]), "c": np.float32(2.5)}
    for protocol in (2, 3, 4, 5):
        found = read_arrays(Path("x"), io.BytesIO(pickle.dumps(wanted, protocol=protocol)))
        assert np.array_equal(found["a"], wanted["a"]) and found["a"].dtype == np.dtype(">i4")
        assert np.array_equal(found["b"], wanted["b"]) and found["c"] == 2.5


def test_a_tar_that_unpacks_to_far_more_than_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches.limits, "UNPACKED", 1 << 20)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("data_batch_1")
        member.size = 2 << 20
        archive.addfile(member, io.BytesIO(bytes(2 << 20)))
    with pytest.raises(UserError, match="would unpack to over 50 times its size"):
        open_images(tmp_path / "cifar.tar.gz")
