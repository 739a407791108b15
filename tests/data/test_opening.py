"""Folders and zips that other programs made: what is read, and what is named as unusable."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imagewright.data import opening
from imagewright.data.opening import open_images
from imagewright.data.pixels import encode_png
from imagewright.types import UserError

JUNK = {
    "readme.txt": b"hello",
    "Thumbs.db": b"\0",
    "__MACOSX/._a.png": b"\0",
    ".hidden.png": b"\0",
    ".git/x.png": b"\0",
}


def picture(value: int = 0, size: int = 4, channels: int = 3) -> bytes:
    return encode_png(np.full((size, size, channels), value, dtype=np.uint8))


def folder(at: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content)
    return at


def zipped(at: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path = at / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            archive.writestr(name, content)
    return path


MAKERS = pytest.mark.parametrize("make", [folder, zipped])


def labels_json(labels: object, **more: object) -> bytes:
    return json.dumps({"labels": labels, **more}).encode()


# --- what is read -------------------------------------------------------------------------------------------


@MAKERS
def test_flat_pictures_have_no_classes(tmp_path, make):
    images = open_images(make(tmp_path, {"b.png": picture(2), "a.PNG": picture(1), "c.Jpg": picture(3)} | JUNK))
    assert images.names == ("a.PNG", "b.png", "c.Jpg")
    assert images.images()[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert images.labels.tolist() == [-1, -1, -1]
    assert images.spec.num_classes == 0
    assert images.spec.shape == (3, 4, 4)
    assert images.skipped == ()


@MAKERS
@pytest.mark.parametrize("root", ["", "pets/", "a/b/"])
def test_folders_are_classes_in_sorted_order(tmp_path, make, root):
    names = ["dog/1.png", "cat/deep/2.png", "cat/1.png", "eel/1.png"]
    images = open_images(make(tmp_path, {root + n: picture(i) for i, n in enumerate(names)} | JUNK))
    assert images.spec.class_names == ("cat", "dog", "eel")
    assert [images.spec.class_names[label] for label in images.labels] == ["cat", "cat", "dog", "eel"]
    assert images.images()[:, 0, 0, 0].tolist() == [2, 1, 0, 3]


@MAKERS
def test_nested_folders_below_one_are_no_classes(tmp_path, make):
    images = open_images(make(tmp_path, {"00000/a.png": picture(1), "00000/b.png": picture(2)}))
    assert images.spec.num_classes == 0


@MAKERS
@pytest.mark.parametrize("root", ["", "inner/"])
def test_dataset_json_gives_the_classes(tmp_path, make, root):
    files = {f"{root}0000{i}/img.png": picture(i) for i in range(3)}
    labels = [["00002/img.png", 0], ["00000/img.png", 4], ["./00001\\img.png", 1]]
    images = open_images(make(tmp_path, files | {f"{root}dataset.json": labels_json(labels)}))
    assert images.labels.tolist() == [4, 1, 0]
    assert images.spec.num_classes == 5


@MAKERS
def test_null_labels_mean_no_classes_even_with_folders(tmp_path, make):
    files = {"00000/a.png": picture(), "00001/a.png": picture(), "dataset.json": labels_json(None)}
    assert open_images(make(tmp_path, files)).spec.num_classes == 0


def test_labels_can_be_ignored(tmp_path):
    path = zipped(tmp_path, {"a.png": picture(), "cat/a.png": picture(), "dog/a.png": picture()})
    images = open_images(path, labels=False)
    assert len(images) == 3
    assert images.spec.num_classes == 0


def test_backslashes_and_dots_in_zip_names_are_folders(tmp_path):
    path = zipped(tmp_path, {"./cat\\1.png": picture(), "dog\\1.png": picture()})
    assert open_images(path).spec.class_names == ("cat", "dog")


def test_names_captions_and_splits_of_our_own_keys(tmp_path):
    known = {f"{i}.png": {"name": f"no {i}", "subgroup": "s", "split": "test" if i == 2 else "train"} for i in range(3)}
    labels = [[name, i] for i, name in enumerate(known)]
    files = {name: picture(i) for i, name in enumerate(known)}
    path = zipped(tmp_path, files | {"dataset.json": labels_json(labels, classes=["x", "y", "z", "w"], pictures=known)})
    train, test = open_images(path), open_images(path, split="test")
    assert train.captions == ("no 0", "no 1")
    assert test.labels.tolist() == [2]
    assert test.spec.class_names == train.spec.class_names == ("x", "y", "z", "w")
    assert test.subgroups == ("s",)
    assert len(open_images(path, split="all")) == 3


def test_one_colour_picture_makes_the_set_rgb(tmp_path):
    path = zipped(tmp_path, {"a.png": picture(7, channels=1), "b.png": picture(9)})
    assert open_images(path).images()[:, 0, 0].tolist() == [[7, 7, 7], [9, 9, 9]]
    assert open_images(path, channels=1).images()[:, 0, 0].tolist() == [[7], [9]]
    grey = zipped(tmp_path, {"a.png": picture(7, channels=1)})
    assert open_images(grey).spec.channels == 1
    assert open_images(grey, channels=3).images().shape == (1, 4, 4, 3)


def test_a_rotated_photograph_is_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(out, "JPEG", exif=exif.tobytes())
    assert len(open_images(zipped(tmp_path, {"a.jpg": out.getvalue()}))) == 1


def test_reduction_from_any_multiple(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    path = zipped(tmp_path, {"a.png": encode_png(pixels)})
    out = open_images(path, resolution=4).images()[0]
    np.testing.assert_array_equal(out, np.floor(pixels.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3)) + 0.5))
    for resolution in (5, 24, 0):
        with pytest.raises(UserError, match=f"resolution is {resolution}"):
            open_images(path, resolution=resolution)


def test_progress_reaches_the_end(tmp_path):
    seen = []
    open_images(zipped(tmp_path, {f"{i}.png": picture(i) for i in range(5)}), on_progress=lambda *at: seen.append(at))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_the_fingerprint_knows_content_and_not_containers(tmp_path):
    files = {f"{i}.png": picture(i) for i in range(3)}
    first = open_images(folder(tmp_path / "f", files)).fingerprint
    assert open_images(zipped(tmp_path, files)).fingerprint == first
    labelled = files | {"dataset.json": labels_json([[n, 1] for n in files])}
    assert open_images(zipped(tmp_path, labelled)).fingerprint != first
    assert open_images(zipped(tmp_path, files | {"0.png": picture(9)})).fingerprint != first


def test_indexing(tmp_path):
    images = open_images(zipped(tmp_path, {f"{i}.png": picture(i) for i in range(5)}))
    first = images.images()[:, 0, 0, 0]
    for rows in (
        [3, 1, 1],
        np.array([4]),
        slice(1, 4),
        [-1],
        [],
        np.array([True, False, True, False, False]),
    ):
        expected = first[np.asarray(rows, dtype=int) if isinstance(rows, list) else rows]
        np.testing.assert_array_equal(images.images(rows)[:, 0, 0, 0], expected)
    with pytest.raises(IndexError):
        images.images([5])


# --- what is not usable -------------------------------------------------------------------------------------


def refused(path: Path, *words: str) -> None:
    """The set is refused in one line that has the words; with skip_bad the same files are skipped and counted."""
    with pytest.raises(UserError) as caught:
        open_images(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


GOOD = {f"good{i}.png": picture(i) for i in range(3)}
BAD = {
    "empty.png": (b"", "the file is empty"),
    "text.jpg": (b"this is no picture", "not a picture"),
    "cut.png": (picture(1, 32)[:-30], "damaged"),
    "large.png": (picture(0, 8), "is 8x8; most of the set is 4x4"),
    "flat.bmp": (encode_png(np.zeros((4, 6, 1), dtype=np.uint8)), "is 6x4; pictures have to be square"),
}


@MAKERS
@pytest.mark.parametrize("name", BAD)
def test_an_unusable_file_is_named_with_its_reason_or_skipped(tmp_path, make, name):
    content, reason = BAD[name]
    path = make(tmp_path, GOOD | {name: content})
    refused(path, "1 unusable file:", name, reason)
    images = open_images(path, skip_bad=True)
    assert images.names == tuple(sorted(GOOD))
    assert [n for n, _ in images.skipped] == [name]
    assert reason in images.skipped[0][1]


@MAKERS
def test_of_many_unusable_files_ten_are_named_and_all_counted(tmp_path, make):
    path = make(tmp_path, GOOD | {f"x{i:02d}.png": b"" for i in range(14)})
    refused(path, "14 unusable files", "x00.png", "x09.png", "and 4 more")
    with pytest.raises(UserError) as caught:
        open_images(path)
    assert "x10.png" not in str(caught.value)
    assert len(open_images(path, skip_bad=True).skipped) == 14


@pytest.mark.parametrize("label", [1.5, 1.0, -1, True, None, "1", [1], {"a": 1}, 10**30])
def test_a_label_has_to_be_a_whole_number(tmp_path, label):
    labels = [[n, 0] for n in GOOD] + [["odd.png", label]]
    path = zipped(tmp_path, GOOD | {"odd.png": picture(), "dataset.json": labels_json(labels)})
    refused(path, "odd.png: its label in dataset.json is", "whole number from 0")
    images = open_images(path, skip_bad=True)
    assert len(images) == 3
    assert images.spec.num_classes == 1
    assert len(open_images(path, labels=False)) == 4


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([["good0.png", 0], ["good1.png", 0]], ["good2.png: has no label"]),
        ([[n, 0] for n in [*GOOD, "gone.png"]], ["gone.png: labelled in dataset.json, but there is no such"]),
        ([[n, 0] for n in [*GOOD, "good1.png"]], ["good1.png: labelled more than once"]),
        ([], ["3 unusable files"]),
    ],
)
def test_labels_and_pictures_have_to_match(tmp_path, labels, words):
    refused(zipped(tmp_path, GOOD | {"dataset.json": labels_json(labels)}), *words)


@pytest.mark.parametrize(
    "content",
    [
        b"{not json",
        b"",
        b"\xff\xfe\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        labels_json({"good0.png": 0}),
        labels_json("abc"),
        labels_json([0, 1, 2]),
        labels_json([["good0.png"]]),
        labels_json([["good0.png", 0, 1]]),
        labels_json([[0, "good0.png"]]),
        labels_json([[n, 0] for n in GOOD], classes="abc"),
        labels_json([[n, 0] for n in GOOD], pictures=[1, 2]),
        labels_json([[n, 0] for n in GOOD], pictures={"good0.png": {"name": 3}}),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_dataset_json_of_another_shape_is_refused(tmp_path, content, skip_bad):
    path = folder(tmp_path, GOOD | {"dataset.json": content})
    with pytest.raises(UserError, match=r"dataset\.json"):
        open_images(path, skip_bad=skip_bad)


def test_a_label_beyond_the_class_names_is_unusable(tmp_path):
    labels = [[n, i] for i, n in enumerate(GOOD)]
    path = zipped(tmp_path, GOOD | {"dataset.json": labels_json(labels, classes=["a", "b"])})
    refused(path, "good2.png: its label in dataset.json is 2; there are 2 classes")


def test_a_stray_picture_beside_class_folders_is_unusable(tmp_path):
    path = zipped(tmp_path, {"cat/1.png": picture(), "dog/1.png": picture(), "stray.png": picture()})
    refused(path, "stray.png: lies outside the class folders")
    assert open_images(path, skip_bad=True).labels.tolist() == [0, 1]


def test_classes_do_not_shift_when_all_pictures_of_one_are_skipped(tmp_path):
    path = zipped(tmp_path, {"ant/1.png": b"", "bee/1.png": picture(), "cow/1.png": picture()})
    images = open_images(path, skip_bad=True)
    assert images.spec.class_names == ("ant", "bee", "cow")
    assert images.labels.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/etc/evil.png", "C:\\evil.png", "..\\evil.png"])
def test_names_that_lead_out_of_a_zip_are_unusable(tmp_path, name):
    path = zipped(tmp_path, GOOD | {name: picture()})
    refused(path, "evil.png: its name leads out of the archive")
    assert len(open_images(path, skip_bad=True)) == 3


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_in_a_zip_is_unusable(tmp_path):
    path = zipped(tmp_path, [*GOOD.items(), ("good0.png", picture(9))])
    refused(path, "good0.png: the zip holds 2 files of this name")
    assert open_images(path, skip_bad=True).names == ("good1.png", "good2.png")


def test_damage_inside_a_zip_is_noticed(tmp_path):
    path = zipped(tmp_path, GOOD)
    content = path.read_bytes()
    at = content.index(b"IHDR")
    path.write_bytes(content[:at] + b"JHDR" + content[at + 4 :])
    refused(path, "good0.png: damaged in the zip")


def test_a_broken_link_is_unusable(tmp_path):
    folder(tmp_path, GOOD)
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    refused(tmp_path, "link.png: a broken link")


def test_names_are_printable_in_the_message(tmp_path):
    path = folder(tmp_path, GOOD | {"a\nb\x1b[31m.png": b"", os.fsdecode(b"\xff.png"): b""})
    refused(path, r"a\nb\x1b[31m.png", r"\xff.png")


def test_a_set_with_nothing_usable(tmp_path):
    path = zipped(tmp_path, {"a.png": b"", "b.png": b"zzz"})
    for skip_bad in (False, True):
        with pytest.raises(UserError, match="2 unusable files"):
            open_images(path, skip_bad=skip_bad)


def test_bombs_between_warning_and_error_are_unusable(tmp_path, monkeypatch):
    monkeypatch.setattr("imagewright.limits.PIXELS", 12)  # 4x4 lies between once and twice the limit
    refused(zipped(tmp_path, GOOD), "more than 12 pixels")


@pytest.mark.parametrize("files", [{}, {"notes.txt": b"x"}, {".a.png": picture()}])
def test_a_source_without_pictures(tmp_path, files):
    with pytest.raises(UserError, match="holds no pictures"):
        open_images(folder(tmp_path, files))
    with pytest.raises(UserError, match="holds no pictures"):
        open_images(zipped(tmp_path, files))


def test_the_grids_of_a_run_are_no_set(tmp_path):
    with pytest.raises(UserError, match="is a run's folder and no set of pictures"):
        open_images(folder(tmp_path, {"experiment.json": b"{}", "samples/000000000064.png": picture()}))


def test_sources_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "absent.zip")
    folder(tmp_path, {"a.png": picture(), "b.zip": b"PK\3\4 and then nothing"})
    for name in ("a.png", "b.zip"):
        with pytest.raises(UserError, match="not a readable zip"):
            open_images(tmp_path / name)


def test_options_out_of_range(tmp_path):
    path = zipped(tmp_path, GOOD)
    with pytest.raises(UserError, match="channels is 2"):
        open_images(path, channels=2)
    with pytest.raises(UserError, match="split is 'dev'"):
        open_images(path, split="dev")
    with pytest.raises(UserError, match="no test split"):
        open_images(path, split="test")
    assert len(open_images(path, split="all")) == len(open_images(path, split="train")) == 3


def test_a_picture_that_vanishes_after_opening_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "KEEP_DECODED", 0)
    images = open_images(folder(tmp_path, GOOD))
    (tmp_path / "good1.png").unlink()
    with pytest.raises(UserError, match=r"good1\.png was usable when opened"):
        images.images([1])


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_zip_is_refused_or_read_right(tmp_path, at, flip, cut):
    labels = labels_json([[n, i] for i, n in enumerate(GOOD)])
    path = zipped(tmp_path, GOOD | {"dataset.json": labels})
    content = bytearray(path.read_bytes())
    i = int(at * len(content))
    if cut:
        del content[i:]
    else:
        content[i] ^= flip
    path.write_bytes(content)
    try:
        images = open_images(path)
    except UserError:
        return
    assert {int(p[0, 0, 0]) for p in images.images()} <= {0, 1, 2}
