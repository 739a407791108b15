"""Folders as people have them: links, splits at the top, empty classes, names in other forms, what lies beside."""

from __future__ import annotations

import json
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from imagewright.cli.main import main
from imagewright.data import convert, open_images
from imagewright.data.pixels import encode_png
from imagewright.types import UserError


def put(root: Path, *names: str, size: int = 4) -> Path:
    """Pictures, each of its own grey."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_png(np.full((size, size, 1), 10 * i, np.uint8)))
    return root


def classes(root: Path, **more: object) -> list[str]:
    images = open_images(root, **more)  # type: ignore[arg-type]
    return [images.spec.class_names[label] for label in images.labels]


# --- links


def test_links_to_class_folders_are_classes(tmp_path: Path) -> None:
    real = put(tmp_path / "real", "a/1.png", "b/1.png", "b/deep/2.png", "c/1.png")
    linked = tmp_path / "linked"
    put(linked, "a/1.png")
    for name in "bc":
        os.symlink(real / name, linked / name)
    assert classes(linked) == ["a", "b", "b", "c"]
    every = tmp_path / "every"
    every.mkdir()
    for name in "abc":
        os.symlink(Path("..") / "real" / name, every / name)
    assert classes(every) == ["a", "b", "b", "c"]
    os.symlink(real, tmp_path / "root")
    assert classes(tmp_path / "root") == ["a", "b", "b", "c"]


@pytest.mark.parametrize("target", ["..", "../..", "../b"])
def test_a_loop_of_links_is_named(tmp_path: Path, target: str) -> None:
    root = put(tmp_path / "set", "a/1.png", "b/1.png")
    os.symlink(target, root / "a" / "again")
    if target == "../b":
        os.symlink("../a", root / "b" / "again")
    with pytest.raises(UserError, match=r"again(/set)?: a link to a folder that it lies in"):
        open_images(root)
    images = open_images(root, skip_bad=True)
    assert images.spec.class_names == ("a", "b")
    assert all(reason == "a link to a folder that it lies in" for _, reason in images.skipped)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "1.png")
    os.mkfifo(tmp_path / "2.png")
    with pytest.raises(UserError, match=r"2\.png: not a regular file"):
        open_images(tmp_path)


# --- splits


@pytest.mark.parametrize("names", [("train", "val"), ("train", "test"), ("Training", "Validation"), ("TRAIN", "Valid")])
@pytest.mark.parametrize("root", ["", "imagenet/"])
def test_splits_at_the_top_are_no_classes(tmp_path: Path, names: tuple[str, str], root: str) -> None:
    first, second = names
    put(tmp_path, *(root + n for n in (f"{first}/cat/1.png", f"{first}/dog/1.png", f"{second}/cat/1.png")))
    everything = open_images(tmp_path, split="all")
    assert everything.spec.class_names == ("cat", "dog") and everything.splits is not None
    assert len(everything) == 3 and everything.splits.count("train") == 2
    assert classes(tmp_path) == ["cat", "dog"]
    assert classes(tmp_path, split="test") == ["cat"]  # val is the test split where there is no other


def test_three_splits(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "val/b/1.png", "test/a/1.png", "test/b/1.png")
    assert [classes(tmp_path, split=s) for s in ("train", "val", "test", "all")] == [
        ["a"], ["b"], ["a", "b"], ["a", "b", "a", "b"],
    ]  # fmt: skip


def test_splits_without_classes(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "train/2.png", "test/1.png")
    images = open_images(tmp_path)
    assert images.spec.num_classes == 0 and len(images) == 2
    assert len(open_images(tmp_path, split="test", labels=False)) == 1


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert classes(put(tmp_path, "train/1.png", "bus/1.png")) == ["bus", "train"]


@pytest.mark.parametrize("stray", ["extra/1.png", "1.png"])
def test_splits_beside_others_are_asked_about(tmp_path: Path, stray: str) -> None:
    put(tmp_path, "train/a/1.png", "val/a/1.png", stray)
    with pytest.raises(UserError, match=r"has train, val beside (extra|pictures): are they splits or classes\?"):
        open_images(tmp_path)


def test_a_picture_outside_the_classes_of_its_split_is_named(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/2.png", "val/a/1.png")
    with pytest.raises(UserError, match=r"train/2\.png: lies outside the class folders"):
        open_images(tmp_path)


def test_splits_survive_conversion(tmp_path: Path) -> None:
    put(tmp_path / "set", "train/a/1.png", "val/b/1.png")
    convert(tmp_path / "set", tmp_path / "set.zip")
    assert classes(tmp_path / "set.zip") == ["a"] and classes(tmp_path / "set.zip", split="test") == ["b"]


# --- classes without pictures


def test_an_empty_class_keeps_its_index(tmp_path: Path) -> None:
    put(tmp_path / "set", "a/1.png", "c/1.png")
    (tmp_path / "set/b").mkdir()
    images = open_images(tmp_path / "set")
    assert images.spec.class_names == ("a", "b", "c") and images.labels.tolist() == [0, 2]
    assert images.empty_classes == (1,)
    convert(tmp_path / "set", tmp_path / "set.zip")
    again = open_images(tmp_path / "set.zip")
    assert again.spec.class_names == ("a", "b", "c") and again.empty_classes == (1,)


def test_an_empty_class_of_a_zip_and_of_a_split(tmp_path: Path) -> None:
    content = encode_png(np.zeros((4, 4, 1), np.uint8))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("train/a/1.png", content)
        archive.writestr("train/c/1.png", content)
        archive.writestr("val/b/", b"")
        archive.writestr("val/a/1.png", content)
    images = open_images(tmp_path / "set.zip")
    assert images.spec.class_names == ("a", "b", "c") and images.empty_classes == (1,)
    assert open_images(tmp_path / "set.zip", split="val").empty_classes == (1, 2)


def test_labels_of_a_dataset_json_may_leave_classes_empty(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["1.png", 0], ["2.png", 3]]}))
    assert open_images(tmp_path).empty_classes == (1, 2)


def test_a_class_whose_pictures_are_all_bad_stays_a_class(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "c/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.png").write_bytes(b"no picture")
    images = open_images(tmp_path, skip_bad=True)
    assert images.spec.class_names == ("a", "b", "c") and images.labels.tolist() == [0, 2]


# --- names


@pytest.mark.parametrize(("on_disk", "written"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_are_compared_as_the_letters_they_show(tmp_path: Path, on_disk: str, written: str) -> None:
    put(tmp_path, unicodedata.normalize(on_disk, "ä/é.png"))
    name = unicodedata.normalize(written, "ä/é.png")
    known = {"labels": [[name, 2]], "pictures": {name: {"name": "an e", "split": "test"}}}
    (tmp_path / "dataset.json").write_text(json.dumps(known), encoding="utf-8")
    images = open_images(tmp_path, split="all")
    assert images.labels.tolist() == [2] and images.captions == ("an e",) and images.splits == ("test",)


def test_class_folders_of_two_forms_are_one_class(tmp_path: Path) -> None:
    put(tmp_path, unicodedata.normalize("NFD", "é/1.png"), unicodedata.normalize("NFC", "é/2.png"), "f/1.png")
    assert open_images(tmp_path).spec.class_names == ("f", unicodedata.normalize("NFC", "é"))


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = put(tmp_path / "set", os.fsdecode(b"caf\xe9/1.png"), "z/1.png", os.fsdecode(b"z/\xff.png"))
    (root / os.fsdecode(b"\xfe.txt")).touch()
    main(["data", "convert", str(root), str(tmp_path / "set.zip")])
    assert r"no pictures, not read: \xfe.txt" in capsys.readouterr().out
    images = open_images(tmp_path / "set.zip")
    assert images.spec.class_names == (r"caf\xe9", "z") and len(images) == 3
    main(["data", "info", str(root)])
    assert r"caf\xe9" in capsys.readouterr().out


# --- what lies beside


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", ".git/2.png", "b/.3.png", "b/4.png")
    for name in ("a/notes.txt", "readme.md", "dataset.json.bak"):
        (tmp_path / name).touch()
    images = open_images(tmp_path)
    assert images.unread == (".git/", "a/notes.txt", "b/.3.png", "dataset.json.bak", "readme.md")
    assert images.spec.class_names == ("a", "b")


def test_what_sample_wrote_is_a_set(tmp_path: Path) -> None:
    put(tmp_path, "000000.png", "000001.png")
    put(tmp_path, "grid.png", "trajectory.png", size=9)
    with pytest.raises(UserError, match=r"grid\.png: is 9x9"):
        open_images(tmp_path)
    (tmp_path / "samples.json").write_text("{}")
    images = open_images(tmp_path)
    assert images.names == ("000000.png", "000001.png") and images.unread == ("grid.png", "trajectory.png")
