"""The two sets inside the package: what they hold never changes unnoticed."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from imagewright.data import open_images
from imagewright.data.build_emoji64 import CLASSES, build
from imagewright.data.embedded import EMOJI64, EMOJI64_SHA256
from imagewright.data.image_set import held_out
from imagewright.data.inspection import pixel_moments
from imagewright.types import UserError

CARDS = Path(__file__).parents[2] / "docs" / "data"


@pytest.fixture(scope="module", params=["emoji64", "digits"])
def opened(request):
    return {split: open_images(request.param, split=split) for split in ("all", "train", "test")}


@pytest.fixture(scope="module")
def emoji():
    return open_images("emoji64", split="all")


def test_the_emoji_asset_is_the_one_whose_checksum_is_recorded():
    assert hashlib.sha256(EMOJI64.read_bytes()).hexdigest() == EMOJI64_SHA256
    assert EMOJI64_SHA256 in (CARDS / "emoji64.md").read_text(encoding="utf-8")
    assert EMOJI64.stat().st_size < 8_000_000


def test_emoji_are_64_pixels_rgb_in_nine_unicode_groups(emoji):
    assert emoji.spec.shape == (3, 64, 64)
    assert emoji.spec.class_names == CLASSES
    assert len(emoji) == 1892
    assert emoji.subgroups is not None and len(set(emoji.subgroups)) == 98
    by_caption = dict(zip(emoji.captions, emoji.labels.tolist(), strict=True))
    assert CLASSES[by_caption["slice of pizza"]] == "Food & Drink"
    assert CLASSES[by_caption["egypt flag"]] == "Flags"


def test_emoji_lie_on_white(emoji):
    corners = emoji.images()[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(axis=(1, 2)).mean() > 0.7
    black_frame = (corners == 0).all(axis=(1, 2)).sum()  # what a lost alpha channel would give
    assert black_frame == 0


def test_no_two_emoji_are_the_same_picture(emoji):
    assert len(set(emoji.digests)) == len(emoji)


def test_the_asset_is_stored_uncompressed_with_fixed_time_stamps():
    with zipfile.ZipFile(EMOJI64) as archive:
        entries = archive.infolist()
    assert {e.compress_type for e in entries} == {zipfile.ZIP_STORED}
    assert {e.date_time for e in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert entries[0].filename == "00000/img00000000.png"


def test_the_emoji_split_follows_from_the_code_points():
    with zipfile.ZipFile(EMOJI64) as archive:
        meta = json.loads(archive.read("dataset.json"))
    for known in meta["pictures"].values():
        number = int(hashlib.sha256(known["codepoints"].encode()).hexdigest(), 16)
        assert known["split"] == ("test" if number % 10 == 0 else "train")
    order = [[int(c, 16) for c in known["codepoints"].split("-")] for known in meta["pictures"].values()]
    assert order == sorted(order)


def test_train_and_test_are_a_partition(opened):
    whole, train, test = opened["all"], opened["train"], opened["test"]
    assert set(train.names) | set(test.names) == set(whole.names)
    assert not set(train.names) & set(test.names)
    assert 0.08 < len(test) / len(whole) < 0.12
    assert set(test.labels) == set(range(whole.spec.num_classes))
    assert train.fingerprint != test.fingerprint


def test_the_card_states_what_the_set_holds(opened):
    whole = opened["all"]
    card = (CARDS / f"{whole.spec.name}.md").read_text(encoding="utf-8")
    assert whole.fingerprint in card
    for index, name in enumerate(whole.spec.class_names):
        train, test, both = (int((opened[s].labels == index).sum()) for s in ("train", "test", "all"))
        assert f"| {index} | {name} | {train} | {test} | {both} |" in card
    for moment in pixel_moments(whole):
        assert f"{moment:.4f}" in card


def test_digits_are_scikit_learns_scaled_to_bytes():
    digits = open_images("digits", split="all")
    values, targets = load_digits(return_X_y=True)
    expected = {v: int(np.floor(v * 255 / 16 + 0.5)) for v in range(17)}
    np.testing.assert_array_equal(
        digits.images()[..., 0].reshape(len(digits), 64), np.vectorize(expected.get)(values.astype(int))
    )
    np.testing.assert_array_equal(digits.labels, targets)
    assert digits.splits == tuple("test" if held_out(str(i)) else "train" for i in range(1797))


@pytest.mark.parametrize("resolution", [1, 32])
def test_emoji_reduce_by_exact_block_means(emoji, resolution):
    small = open_images("emoji64", resolution=resolution, split="all")
    k = 64 // resolution
    blocks = emoji.images(slice(0, 40)).reshape(40, resolution, k, resolution, k, 3).astype(np.float64)
    np.testing.assert_array_equal(small.images(slice(0, 40)), np.floor(blocks.mean(axis=(2, 4)) + 0.5))


@pytest.mark.parametrize(("source", "resolution"), [("digits", 16), ("digits", 3), ("emoji64", 128), ("emoji64", 24)])
def test_enlarging_and_broken_blocks_are_refused(source, resolution):
    with pytest.raises(UserError, match=f"resolution is {resolution}"):
        open_images(source, resolution=resolution)


def test_embedded_sets_without_labels_are_unconditional():
    for source in ("digits", "emoji64"):
        images = open_images(source, labels=False, split="test")
        assert images.spec.num_classes == 0
        assert (images.labels == -1).all()


def test_a_folder_may_be_called_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        open_images(Path("digits"))


def test_the_builder_refuses_another_package(tmp_path):
    package = tmp_path / "emoji.tgz"
    package.write_bytes(b"something else")
    with pytest.raises(UserError, match="npm pack emoji-datasource-google"):
        build(package, tmp_path / "out.zip")
    with pytest.raises(UserError, match="cannot be read"):
        build(tmp_path / "absent.tgz", tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()
