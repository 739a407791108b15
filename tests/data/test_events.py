"""Events of a moving picture, recorded ones, and the sets that pair them with pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagewright.data import Loader, open_images
from imagewright.data.event_augment import histogram, normalised
from imagewright.data.event_files import EventFiles, read_events
from imagewright.data.event_simulator import LEAST, Simulator, film, fired
from imagewright.data.events import EventSet, StandinEvents
from imagewright.training.snapshots import save_image
from imagewright.types import UserError

DIGITS = StandinEvents(source="digits", scale=2, most=512)


# --- the camera -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("frames", [2, 9])
def test_a_ramp_of_so_many_thresholds_fires_so_often(sign: int, frames: int) -> None:
    """Evenly, at the moments at which brightness passes: also several within one interval."""
    ramp = sign * np.linspace(0, 5 * 0.2, frames)[None, :, None, None] * np.ones((1, 1, 2, 3))
    (events,) = fired(ramp, np.full((1, 2, 3), 0.2))
    assert len(events) == 5 * 6 and (events[:, 3] == sign).all()
    for x in range(3):
        for y in range(2):
            mine = events[(events[:, 0] == x) & (events[:, 1] == y)]
            np.testing.assert_allclose(mine[:, 2], (frames - 1) * np.arange(1, 6) / 5, atol=1e-6)


def test_a_still_picture_fires_nothing_and_signs_add_up_to_the_change() -> None:
    draw = np.random.default_rng(0)
    levels = np.cumsum(draw.normal(0, 0.1, (3, 40, 4, 5)), 1)
    thresholds = draw.uniform(0.15, 0.25, (3, 4, 5))
    levels[2] = 1.5
    found = fired(levels, thresholds)
    assert len(found[2]) == 0 and len(found) == 3
    for events, film_, c in zip(found[:2], levels, thresholds, strict=False):
        total = np.zeros((4, 5))
        np.add.at(total, (events[:, 1].astype(int), events[:, 0].astype(int)), events[:, 3])
        left = film_[-1] - film_[0] - total * c
        assert (np.abs(left) <= c + 1e-9).all() and np.abs(total).max() >= 2
        assert (np.diff(events[:, 2]) >= 0).all() and events[:, 2].max() <= 39


def test_a_window_shows_the_picture_where_it_is() -> None:
    picture = np.arange(30.0).reshape(1, 5, 6)
    still = film(picture, np.zeros((1, 2, 2)))
    np.testing.assert_array_equal(still[0, 0], picture[0])
    moved = film(picture, np.array([[[1.0, 0.5]]]))[0, 0]
    np.testing.assert_allclose(moved[:4, :5], picture[0, 1:, :5] + 0.5)
    np.testing.assert_array_equal(moved[4], moved[3])  # the border repeats
    doubled = film(picture, np.zeros((1, 1, 2)), 2)[0, 0]
    assert doubled.shape == (10, 12) and doubled[1, 1] == pytest.approx(0.25 * (0 + 1) * 1 + 0.25 * 6)


def test_what_comes_of_a_picture_depends_on_seed_and_index_alone() -> None:
    pictures = open_images("digits").images(np.arange(4))
    camera = Simulator(noise=2.0)
    all_four = camera(pictures, range(4), 0, 2)
    (alone,) = camera(pictures[2:3], [2], 0, 2)
    np.testing.assert_array_equal(all_four[2], alone)
    assert not np.array_equal(alone[:50], camera(pictures[2:3], [2], 1, 2)[0][:50])
    assert not np.array_equal(alone[:50], camera(pictures[2:3], [3], 0, 2)[0][:50])
    assert alone[:, 2].max() <= 0.3 and alone[:, :2].max() == 15 and set(alone[:, 3]) == {1, -1}


def test_noise_is_of_its_rate() -> None:
    dark = np.zeros((20, 16, 16, 1), np.uint8)
    counts = [len(e) for e in Simulator(noise=5.0)(dark, range(20), 0)]
    assert np.mean(counts) == pytest.approx(5 * 0.3 * 256, rel=0.05)
    assert not any(len(e) for e in Simulator()(dark, range(20), 0))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": (0.3, 0.2)}, r"simulator\.threshold is \(0.3, 0.2\)"),
        ({"threshold": (LEAST / 2, 1)}, "numbers >= 0.05"),
        ({"frames": 2}, r"simulator\.frames is 2"),
        ({"floor": 0.0}, r"simulator\.floor is 0"),
        ({"noise": 1e9}, r"simulator\.noise is 1e\+09; .* no more than 1000 events a pixel"),
    ],
)
def test_cameras_that_are_none(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Simulator(**settings)


# --- sets -------------------------------------------------------------------------------------------------------------


def test_batches_are_pairs_cut_at_random_places_that_the_position_decides() -> None:
    found: EventSet = DIGITS.open()
    assert found.spec.channels == 2 and found.spec.resolution == 16 and found.spec.num_classes == 10
    loader = Loader(found, 4, 0)
    whole, part = loader.batch(0, 4), Loader(DIGITS.open(), 2, 0).batch(2, 2)
    assert torch.equal(whole.events[2:], part.events) and torch.equal(whole.images[2:], part.images)
    assert whole.events.shape == (4, 512, 4) and whole.images.shape == (4, 1, 8, 8)
    again = loader.batch(len(found), len(found) % 7 + 1)
    assert (whole.events[..., 3] != 0).sum(1).max() == 512 and again.events.shape[1] == 512
    row = next(i for i in range(9) if len(found.read(np.array([i]))[0][0]) > 700)
    (events,), pictures = found.read(np.array([row]))
    for chance, start in ((0.0, 0), (0.999999, len(events) - 512), (0.5, (len(events) - 511) // 2)):
        cut = found.batch(([events], pictures), np.array([row]), lambda chance=chance: np.array([chance])).events
        np.testing.assert_array_equal(cut[0], events[start : start + 512])


def test_fingerprints_tell_what_is_another_set() -> None:
    prints = {c.open().fingerprint for c in (DIGITS, replace(DIGITS, seed=1), replace(DIGITS, split="test"))}
    other = replace(DIGITS, simulator=Simulator(floor=0.1)).open().fingerprint
    assert len(prints | {other}) == 4 and DIGITS.open().fingerprint in prints
    frames = {replace(c, frames=True).open().fingerprint for c in (DIGITS, replace(DIGITS, seed=1))}
    assert len(frames) == 2 and not frames & prints


def test_frames_are_pictures_of_two_channels() -> None:
    config = replace(DIGITS, most=1 << 14)
    pairs, frames = config.open(), replace(config, frames=True).open()
    shown = frames.images(np.arange(3))
    events, _ = pairs.read(np.arange(3))
    assert shown.shape == (3, 16, 16, 2) and frames.spec.num_classes == 10
    counts = histogram(torch.from_numpy(events[1])[None], 16)
    assert counts.sum() == len(events[1])
    np.testing.assert_allclose(shown[1] / 127.5 - 1, normalised(counts)[0].permute(1, 2, 0), atol=0.004)


def test_a_picture_on_its_ground_moves_as_one_with_a_black_border() -> None:
    """Within a frame that has room for it, and as another set than the same without."""
    data = replace(DIGITS, scale=1, ground=4).open()
    assert data.spec.resolution == 16 and data.frames().spec.resolution == 16
    rows = np.array([3, 0])
    events, pictures = data.read(rows)
    assert pictures.shape[1:3] == (8, 8)
    framed = np.zeros((2, 16, 16, 1), np.uint8)
    framed[:, 4:12, 4:12] = pictures
    for mine, theirs in zip(events, Simulator()(framed, [3, 0], 0), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert replace(DIGITS, scale=1, ground=4).open().identity != replace(DIGITS, scale=1).open().identity


def test_settings_that_are_none() -> None:
    with pytest.raises(UserError, match=r"data\.ground is -1"):
        replace(DIGITS, ground=-1)
    with pytest.raises(UserError, match=r"data\.scale is 3"):
        replace(DIGITS, scale=3)
    with pytest.raises(UserError, match=r"data\.most is 0"):
        replace(DIGITS, most=0)


# --- files ------------------------------------------------------------------------------------------------------------

EVENTS = np.array([[0, 0, 10, 1], [639, 479, 30, 0], [320, 240, 20, 1]], np.int64)


def save_npz(path: Path, table: np.ndarray = EVENTS, **changed: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros(len(table), [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "?")])
    for name, column in zip("xytp", table.T, strict=True):
        data[name] = column
    np.savez(path, **({"event_data": data} | changed))


def test_files_of_both_kinds(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("# x y t p\n0 0 1e-5 1\n639,479,3e-5,-1\n320 240 2e-5 1\n\n")
    names = ("x_pos", "y_pos", "timestamp", "polarity")
    np.savez(tmp_path / "b.npz", **dict(zip(names, EVENTS.T, strict=True)))
    wanted = [[0, 0, 0, 1], [112, 112, 1e-5, 1], [639 * 0.35, 479 * 224 / 480, 2e-5, -1]]
    for name in ("a.npz", "a.txt", "b.npz"):
        np.testing.assert_allclose(read_events(tmp_path / name, (480, 640), 224), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("1 2 3\n", r"a\.txt is damaged: a line must be four numbers, x y t p \(1 2 3\)"),
        ("1 2 three 1\n", r"a\.txt is damaged: a line must be four numbers"),
        ("1 2 nan 1\n", "not finite"),
        ("1 2 0 1\n1 2 1e300 1\n", r"not below 1e\+30"),
        ("1 2 3 5\n", "signs of events must be 1 and -1"),
        ("1 2 3 0\n1 2 3 -1\n", "signs of events must be"),
        ("640 2 3 1\n", r"to \(640, 2\); data\.sensor is 480 x 640"),
    ],
)
def test_damaged_texts_are_refused_in_a_sentence(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=says):
        read_events(tmp_path / "a.txt", (480, 640), 224)


def test_places_within_the_sensor_are_within_the_frame(tmp_path: Path) -> None:
    """Also those that float32 rounds up to its border; and nothing at all is a recording, too."""
    (tmp_path / "a.txt").write_text("\ufeff639.99999999 479.99999999 0 1\n", "utf-8")
    found = read_events(tmp_path / "a.txt", (480, 640), 224)
    assert found[0, :2].tolist() == [np.nextafter(np.float32(224), np.float32(0))] * 2
    assert histogram(torch.from_numpy(found)[None], 224)[0, 0, 223, 223] == 1
    (tmp_path / "a.txt").write_text("# nothing happened\n")
    assert read_events(tmp_path / "a.txt", (480, 640), 224).shape == (0, 4)


def test_damaged_arrays_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, other=EVENTS)
    with pytest.raises(UserError, match="holds no events"):
        read_events(path, (480, 640), 224)
    np.savez(path, event_data=EVENTS)
    with pytest.raises(UserError, match="no fields x, y, t and p"):
        read_events(path, (480, 640), 224)
    np.savez(path, x_pos=EVENTS[:, 0], y_pos=EVENTS[:2, 1], timestamp=EVENTS[:, 2], polarity=EVENTS[:, 3])
    with pytest.raises(UserError, match="as many numbers each"):
        read_events(path, (480, 640), 224)
    np.savez(path, event_data=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match="pickle"):
        read_events(path, (480, 640), 224)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"a\.npz is no readable npz"):
        read_events(path, (480, 640), 224)


@pytest.fixture
def recorded(tmp_path: Path) -> EventFiles:
    for split, theirs in (("extracted_train", "train"), ("extracted_val", "val")):
        for folder in ("n01", "n02"):
            for i in range(2):
                save_npz(tmp_path / "events" / split / folder / f"{folder}_{i}.npz", EVENTS[: 3 - i])
                pictures = tmp_path / "pictures" / theirs / folder
                pictures.mkdir(parents=True, exist_ok=True)
                save_image(pictures / f"{folder}_{i}.png", np.full((20, 30, 3), 40 * i, np.uint8))
    return EventFiles(
        source=str(tmp_path / "events"), pictures=str(tmp_path / "pictures"), resolution=32, picture_resolution=16,
        most=8,
    )  # fmt: skip


def test_recordings_and_pictures_of_a_name_are_pairs(recorded: EventFiles, tmp_path: Path) -> None:
    found = recorded.open()
    assert len(found) == 4 and found.spec.class_names == ("n01", "n02") and found.spec.resolution == 32
    batch = found.prepared(found.batch(found.read(np.array([1, 2])), np.array([1, 2]), lambda: np.zeros(2)))
    assert batch.cond.label.tolist() == [0, 1] and batch.images.shape == (2, 3, 16, 16)
    assert (batch.events[..., 3] != 0).sum(1).tolist() == [2, 3]
    assert batch.images[:, 0, 0, 0].tolist() == pytest.approx([40 / 127.5 - 1, -1])
    assert replace(recorded, split="test", frames=True).open().images(np.arange(4)).shape == (4, 32, 32, 2)
    (tmp_path / "pictures" / "train" / "n02" / "n02_1.png").unlink()
    with pytest.raises(UserError, match=r"n02_1\.npz has no picture n02/n02_1\.\* .* \(1 have none\)"):
        recorded.open()


def test_two_files_of_a_name_are_refused(recorded: EventFiles, tmp_path: Path) -> None:
    twin = tmp_path / "pictures" / "train" / "n01" / "n01_1.jpg"
    save_image(twin.with_suffix(".png"), np.zeros((20, 30, 3), np.uint8))
    twin.write_bytes(twin.with_suffix(".png").read_bytes())
    with pytest.raises(UserError, match=r"has n01/n01_1\.jpg and n01/n01_1\.png; a pair has one file of each kind"):
        recorded.open()
    twin.unlink()
    (tmp_path / "events" / "extracted_train" / "n02" / "n02_0.txt").write_text("1 2 3 1\n")
    with pytest.raises(UserError, match=r"has n02/n02_0\.npz and n02/n02_0\.txt; a pair"):
        recorded.open()


def test_pictures_are_cut_and_reduced_as_the_teacher_is_shown_them(recorded: EventFiles, tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    save_image(tmp_path / "pictures" / "train" / "n01" / "n01_0.png", wide)
    found = recorded.open().pictures.images(np.array([0]))[0]
    np.testing.assert_array_equal(found, Image.fromarray(wide[:, 10:50]).resize((16, 16), Image.Resampling.BICUBIC))


def test_folders_that_are_not_there(recorded: EventFiles, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        replace(recorded, source=str(tmp_path / "nothing")).open()
    with pytest.raises(UserError, match=r"data\.split is 'val'"):
        replace(recorded, split="val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no events' files"):
        replace(recorded, source=str(tmp_path / "empty")).open()
    with pytest.raises(UserError, match="has no test split: no folder extracted_val or val or test"):
        replace(recorded, source=str(tmp_path / "empty"), split="test").open()
