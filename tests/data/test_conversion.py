"""EDM zips out and in again, and the numbers about a set."""

import json
import zipfile

import numpy as np
import pytest

from imagewright.data import ImageSet, convert, info, open_images, opening, write_edm_zip
from imagewright.data.edm_zip import file_name
from imagewright.types import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 2, 0, 0]


def same(a: ImageSet, b: ImageSet) -> None:
    np.testing.assert_array_equal(a.images(), b.images())
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.spec.class_names == b.spec.class_names
    assert a.fingerprint == b.fingerprint
    assert (a.captions, a.subgroups, a.splits) == (b.captions, b.subgroups, b.splits)


def test_converting_keeps_pixels_labels_and_what_is_known(tmp_path):
    written = convert("emoji64", tmp_path / "out.zip", resolution=16)
    back = open_images(tmp_path / "out.zip", split="all")
    same(back, written)
    test = open_images(tmp_path / "out.zip", split="test")
    same(test, back.subset([i for i, split in enumerate(written.splits) if split == "test"]))


def test_the_same_set_gives_the_same_bytes_from_memory_and_from_files(tmp_path, monkeypatch):
    first = write_edm_zip(ImageSet.of(PIXELS, LABELS), tmp_path / "a.zip")
    second = convert(first, tmp_path / "b.zip")
    monkeypatch.setattr(opening, "KEEP_DECODED", 0)
    lazy = convert(first, tmp_path / "c.zip")
    assert second.in_memory and not lazy.in_memory
    assert first.read_bytes() == (tmp_path / "b.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()


def test_a_set_may_be_converted_onto_itself(tmp_path):
    path = write_edm_zip(ImageSet.of(PIXELS, LABELS), tmp_path / "a.zip")
    before = path.read_bytes()
    convert(path, path)
    assert path.read_bytes() == before


def test_the_layout_is_edms(tmp_path):
    path = write_edm_zip(iter(PIXELS), tmp_path / "deep" / "a.zip", labels=LABELS)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        meta = json.loads(archive.read("dataset.json"))
        assert {e.compress_type for e in archive.infolist()} == {zipfile.ZIP_STORED}
    assert names == [*(f"00000/img0000000{i}.png" for i in range(6)), "dataset.json"]
    assert meta == {"labels": [[n, label] for n, label in zip(names, LABELS, strict=False)]}
    assert file_name(1_234_567) == "01234/img01234567.png"


def test_without_labels_they_are_null(tmp_path):
    path = write_edm_zip(PIXELS[..., :1], tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    images = open_images(path)
    assert images.spec.channels == 1
    assert images.spec.num_classes == 0


@pytest.mark.parametrize(
    ("pixels", "labels", "words"),
    [
        ([], None, "no pictures to write"),
        (PIXELS, [0, 1], "2 labels for 6 pictures"),
        (PIXELS, [0, 0, 0, 0, 0, -1], "must all be >= 0"),
        (PIXELS[:, :2], None, "must be square"),
        ([PIXELS[0], PIXELS[0, :2, :2]], None, "picture 1 is"),
        (PIXELS.astype(np.float32), None, "must be uint8"),
        (PIXELS[..., :2], None, "must be uint8"),
    ],
)
def test_a_senseless_set_leaves_no_file(tmp_path, pixels, labels, words):
    with pytest.raises(UserError, match=words):
        write_edm_zip(pixels, tmp_path / "a.zip", labels=labels)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_keeps_the_file_that_was_there(tmp_path):
    path = write_edm_zip(PIXELS, tmp_path / "a.zip")
    before = path.read_bytes()
    with pytest.raises(UserError):
        write_edm_zip([PIXELS[0], PIXELS[1, :2]], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "dir.zip").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "dir.zip", tmp_path / "file" / "a.zip"):
        with pytest.raises(UserError, match="cannot be written"):
            write_edm_zip(PIXELS, out)
    with pytest.raises(UserError, match=r"end in \.zip"):
        write_edm_zip(PIXELS, tmp_path / "a.tar")


def test_class_names_survive_folders(tmp_path):
    for name in ("cat", "dog"):
        write_edm_zip(PIXELS, tmp_path / "in" / name / "x.zip")
        with zipfile.ZipFile(tmp_path / "in" / name / "x.zip") as archive:
            archive.extract("00000/img00000000.png", tmp_path / "in" / name)
        (tmp_path / "in" / name / "x.zip").unlink()
    same(open_images(convert_to(tmp_path)), open_images(tmp_path / "in"))


def convert_to(tmp_path):
    convert(tmp_path / "in", tmp_path / "out.zip")
    return tmp_path / "out.zip"


def test_info_counts_and_measures(tmp_path):
    path = write_edm_zip(ImageSet.of(PIXELS, LABELS), tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("z.png", b"")
    found = info(path)
    assert found.count == 6
    assert found.per_class == (3, 1, 2)
    assert found.per_split == {"train": 6}
    scaled = PIXELS / 127.5 - 1
    assert found.mean == pytest.approx(scaled.mean(), abs=1e-12)
    assert found.std == pytest.approx(scaled.std(), abs=1e-12)
    assert [name for name, _ in found.skipped] == ["z.png"]
    assert info(write_edm_zip(PIXELS, tmp_path / "b.zip")).per_class == ()


def test_an_array_becomes_a_set():
    images = ImageSet.of(PIXELS, LABELS, class_names=("a", "b", "c", "d"))
    assert images.spec.num_classes == 4
    assert images.spec.shape == (3, 4, 4)
    np.testing.assert_array_equal(images.images(), PIXELS)
    for pixels, labels in [(PIXELS[:, :2], None), (PIXELS[0], None), (PIXELS, [0]), (PIXELS, [-1] * 6)]:
        with pytest.raises(UserError):
            ImageSet.of(pixels, labels)
