"""Folders of clips: windows, captions by their moments, sounds of any format; damage is one sentence."""

from __future__ import annotations

import shutil
import wave
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imagewright.cli.main import main
from imagewright.data.clip_folder import ClipFolder, ClipFolderConfig
from imagewright.data.pixels import encode_png
from imagewright.data.words import PAD
from imagewright.types import UserError

CONFIG = ClipFolderConfig(source="", split="all", resolution=4, channels=1, frames=2, fps=5, file_fps=10, samples=80,
                          sample_rate=200, captions=2, words=5)  # fmt: skip


def write_sound(path: Path, values: np.ndarray[Any, Any], rate: int = 200, width: int = 2, channels: int = 1) -> None:
    whole = np.round(values * 2 ** (8 * width - 1)).astype(np.int64).clip(None, 2 ** (8 * width - 1) - 1)
    raw = (whole + (128 if width == 1 else 0)).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(raw, channels, 0).tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of one video each: of nine pictures, and of four without sound and text."""
    root = tmp_path / "videos"
    for name, count in (("cats/one", 9), ("dogs/two", 4)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.png").write_bytes(encode_png(np.full((6, 4, 1), 10 * i, np.uint8)))
    write_sound(root / "cats/one/sound.wav", np.arange(180) / 200)
    (root / "cats/one/captions.txt").write_text("0.7\ta cat sleeps\n0.1\tand wakes\nthat is all\n1.5\tlook here\n")
    return root


def opened(folder: Path, **changes: Any) -> Any:
    return replace(CONFIG, source=str(folder), **changes).open()


def test_videos_are_cut_into_windows(folder: Path) -> None:
    clips = opened(folder)
    assert len(clips) == 3 and clips.spec.class_names == ("cats", "dogs") and clips.labels.tolist() == [0, 0, 1]
    batch = clips.at(np.arange(3))
    shades = ((batch.video[:, 0, :, 0, 0] + 1) * 127.5).round().int().tolist()
    assert shades == [[0, 20], [40, 60], [0, 20]]  # every other picture: 10 a second in the folder, 5 in a clip
    assert batch.heard.tolist() == [1, 1, 0] and batch.told.tolist() == [1, 1, 0]
    np.testing.assert_allclose(batch.audio[1], (np.arange(80) + 80) / 200, atol=1e-4)  # from second 0.4 on


def test_captions_are_those_nearest_to_the_middle(folder: Path) -> None:
    origin: ClipFolder = opened(folder).origin
    assert origin.read(np.array([0, 1]), CONFIG.shape).texts == [
        ("that is all", "and wakes"),  # whose moment is not told comes first
        ("that is all", "a cat sleeps"),
    ]
    assert origin.query(2) is None
    words = opened(folder).vocabulary
    assert sorted(words.known) == ["a", "all", "and", "cat", "here", "is", "look", "sleeps", "that", "wakes"]


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_of_other_formats(width: int, folder: Path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 5 * np.arange(400) / 400)
    write_sound(folder / "cats/one/sound.wav", tone, rate=400, width=width, channels=2)
    audio = opened(folder).at(np.array([0])).audio[0]
    np.testing.assert_allclose(audio[5:-5], tone[::2][5:75], atol=0.02)


def test_a_zip_is_as_good_and_splits_are_folders(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
    assert opened(tmp_path / "v.zip").fingerprint == opened(folder).fingerprint
    shutil.move(folder / "cats", tmp_path / "s" / "train" / "cats")
    shutil.move(folder / "dogs", tmp_path / "s" / "test" / "dogs")
    train, test = (opened(tmp_path / "s", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (2, 1) and test.spec.class_names == ("cats", "dogs")
    assert (test.words(()) == PAD).all()


DAMAGE: dict[str, tuple[str, bytes | None, str]] = {
    "no wav": ("cats/one/sound.wav", b"RIFFxxxx", "sound.wav is no PCM wav file"),
    "empty wav": ("cats/one/sound.wav", b"", "sound.wav is no PCM wav file: it ends too soon"),
    "no text": ("cats/one/captions.txt", b"\xff\xfe\x00", "captions.txt is no UTF-8 text"),
    "no picture": ("cats/one/002.png", b"\x89PNG\r\n\x1a\nxx", "002.png is no usable picture: "),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told(what: str, folder: Path) -> None:
    name, content, says = DAMAGE[what]
    (folder / name).write_bytes(content or b"")
    with pytest.raises(UserError, match=says):
        opened(folder).at(np.arange(2))


def test_a_sound_that_ends_within_a_sample_is_told(folder: Path) -> None:
    path = folder / "cats/one/sound.wav"
    path.write_bytes(path.read_bytes()[:-1])
    clips = opened(folder, samples=400, sample_rate=200)
    with pytest.raises(UserError, match=r"sound\.wav ends within a sample"):
        clips.at(np.arange(1))


def test_what_is_no_set_of_clips_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two has 4 pictures; a clip of data\.frames 3 takes 6"):
        opened(folder, frames=3)
    with pytest.raises(UserError, match="must hold a folder of pictures for each video"):
        opened(folder / "cats" / "one")
    with pytest.raises(UserError, match="does not exist"):
        opened(tmp_path / "nowhere")
    shutil.move(folder, tmp_path / "w" / "train")
    with pytest.raises(UserError, match="has no video in its split val"):
        opened(tmp_path / "w", split="val")
    with pytest.raises(UserError, match="split is 'dev'; allowed"):
        replace(CONFIG, split="dev")


def test_the_published_run_is_shown_without_its_clips(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "vatt-ma-howto100m", "--dry-run"])
    said = capsys.readouterr().out
    assert "not there: images howto100m" in said and "encoder: trained, 182.65 M parameters" in said
