"""`standin_triplets`: every clip a function of (seed, index), with the statistics that its head promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imagewright.data.clips import ClipSet
from imagewright.data.standin_triplets import (
    CAPTIONS,
    DETUNED,
    LOWEST,
    NAMED,
    RATE,
    WITHOUT_TEXT,
    Motion,
    StandinTriplets,
    StandinTripletsConfig,
    chord,
    pink,
)
from imagewright.data.words import PAD, words_of
from imagewright.types import UserError

DIGITS = StandinTripletsConfig()


@pytest.fixture(scope="module")
def clips() -> ClipSet:
    return DIGITS.open()


def made(clips: ClipSet) -> StandinTriplets:
    assert isinstance(clips.origin, StandinTriplets)
    return clips.origin


def test_a_clip_is_a_function_of_seed_and_index(clips: ClipSet) -> None:
    several, alone = clips.read(np.array([3, 900, 5])), clips.read(np.array([900]))
    assert (several.video[1] == alone.video[0]).all() and (several.audio[1] == alone.audio[0]).all()
    assert several.texts[1] == alone.texts[0]
    other = replace(DIGITS, seed=1).open()
    assert other.fingerprint != clips.fingerprint
    assert (other.read(np.array([900])).video != alone.video).any()
    again = clips.read(np.array([900 + len(made(clips).pictures)]))  # the same picture, moved otherwise
    assert again.labels == alone.labels and (again.video != alone.video).any()


def test_shapes_and_ranges(clips: ClipSet) -> None:
    batch = clips.at(np.arange(4))
    assert batch.video.shape == (4, 1, 8, 32, 32) and -1 <= float(batch.video.min()) < float(batch.video.max()) <= 1
    assert batch.audio.shape == (4, 2048) and float(batch.audio.abs().max()) == 1
    assert batch.captions.shape == (4, 5, 8) and batch.label.tolist() == [0, 1, 2, 3]
    assert len(clips) == 4 * len(made(clips).pictures) and clips.spec.name == "standin_digits"
    emoji = replace(DIGITS, source="emoji64", frames=4, resolution=16, samples=512).open().at(np.arange(2))
    assert emoji.video.shape == (2, 3, 4, 16, 16) and emoji.audio.shape == (2, 512)


def test_captions_name_the_class_in_one_to_three_of_five_and_a_fifth_has_none(clips: ClipSet) -> None:
    origin, counts, silent = made(clips), set(), 0
    for row in range(1000):
        said = origin.said(row)
        name = origin.names[clips.labels[row]]
        if not said:
            silent += 1
            assert origin.query(row) is None and (clips.words(()) == PAD).all()
            continue
        naming = [text for text in said if name in words_of(text)]
        counts.add(len(naming))
        assert len(said) == len({*said}) == CAPTIONS and origin.query(row) == naming[0]
    assert counts == {*range(NAMED[0], NAMED[1] + 1)}
    assert abs(silent / 1000 - WITHOUT_TEXT) < 0.04
    assert (clips.words(origin.said(0)) != PAD).any(1).all()


def test_a_class_sounds_by_its_partials(clips: ClipSet) -> None:
    assert len({tuple(chord(k)) for k in range(10)}) == 10
    read = clips.read(np.arange(40))
    for label, audio in zip(read.labels, read.audio, strict=True):
        power = np.abs(np.fft.rfft(audio * np.hanning(2048))) ** 2
        hertz = np.arange(len(power)) * RATE / 2048
        near = (np.abs(hertz[:, None] / chord(int(label)) - 1) < DETUNED + 12 / LOWEST).any(1)
        assert power[near].sum() > 0.75 * power.sum()


def test_it_is_as_loud_as_the_motion_is_fast() -> None:
    rng = np.random.default_rng(0)
    time = np.linspace(0, 1, 401)
    motion = Motion.drawn(rng)
    amplitudes = motion.at(np.linspace(0, 4, 4001)).max(0)
    measured = np.linalg.norm(np.gradient(motion.at(time), time, axis=0) / amplitudes, axis=1)
    measured /= measured.max()
    assert np.abs(motion.speed(time) - measured)[1:-1].max() < 0.03


def test_pink_noise_falls_by_three_decibels_an_octave() -> None:
    rng = np.random.default_rng(0)
    power = np.mean([np.abs(np.fft.rfft(pink(2048, rng))) ** 2 for _ in range(60)], 0)
    slope = np.polyfit(np.log(np.arange(4, 900)), np.log(power[4:900]), 1)[0]
    assert abs(slope + 1) < 0.05


def test_what_cannot_be_made_is_told() -> None:
    with pytest.raises(UserError, match="source is 'cifar'; stand-ins are made of digits or emoji64"):
        StandinTripletsConfig(source="cifar")
    with pytest.raises(UserError, match="frames is 0; it must be a whole number"):
        StandinTripletsConfig(frames=0)
