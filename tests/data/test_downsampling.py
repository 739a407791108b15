"""ImageNet made small: pixels of the official programs, batches as published, processes and interruptions."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewright.data import downsampling, open_images
from imagewright.data.clsloc import CLSLOC
from imagewright.data.downsampling import FILTERS, Job, batch_sizes, downsample, small
from imagewright.types import UserError

OFFICIAL = Path(__file__).parents[1] / "parity/data/downsampling.npz"
"""Made by the three programs' own functions at 8x8 of the pictures below, Pillow 13.0.0."""
SIZES = [(50, 71, 3), (71, 50, 3), (64, 64, 3), (33, 90, 1), (20, 17, 3)]


def picture(seed: int, height: int, width: int, channels: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 3 + 1, width // 3 + 1, channels), dtype=np.uint8)
    pixels = coarse.repeat(3, 0).repeat(3, 1)[:height, :width]
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@pytest.mark.parametrize("i", range(len(SIZES)))
def test_pixels_are_those_of_the_official_programs(tmp_path: Path, i: int) -> None:
    official = np.load(OFFICIAL, allow_pickle=False)
    path = tmp_path / "a.png"
    picture(i, *SIZES[i]).save(path)
    for preset in ("edm", "adm"):
        job = Job(source=tmp_path, size=8, preset=preset)  # type: ignore[arg-type]
        assert np.array_equal(small(path, job), official[f"{preset}{i}"]), preset
    for name in FILTERS:
        job = Job(source=tmp_path, size=8, preset="chrabaszcz", filter=name)
        assert np.array_equal(small(path, job), official[f"{name}{i}"]), name


def test_the_published_batches_have_these_sizes() -> None:
    assert batch_sizes(1_281_167) == [128_116] * 9 + [128_123]


def imagenet(folder: Path, *, train: int = 4, val: int = 1) -> Path:
    """Three classes whose alphabetical order is not the development kit's."""
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate(("n01440764", "n02119789", "n02100735")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * k + i + 10 * train * (split == "val"), 20, 30, 3).save(
                    folder / split / name / f"{name}_{i}.png"
                )
    return folder


def test_batches_come_back_with_their_classes(tmp_path: Path) -> None:
    source = imagenet(tmp_path / "imagenet")
    job = Job(source=source, size=8, preset="chrabaszcz")
    made = downsample(job, tmp_path / "npz")
    assert made.counts == {"train": 12, "val": 3} and len(made.files) == 11
    assert not (tmp_path / "npz/parts").exists()
    images = open_images(tmp_path / "npz", split="all")
    assert images.splits == ("train",) * 12 + ("val",) * 3
    by_class = {CLSLOC[k] for k in images.labels.tolist()}
    assert by_class == {"n01440764", "n02119789", "n02100735"}
    for pixels, label in zip(images.images()[:12], images.labels, strict=False):
        folder = source / "train" / CLSLOC[label]
        assert any(np.array_equal(pixels, small(p, job)) for p in folder.iterdir())
    assert images.labels[:12].tolist() != sorted(images.labels[:12].tolist())  # shuffled
    first = np.load(tmp_path / "npz/train_data_batch_1.npz", allow_pickle=False)
    assert first["data"].shape == (1, 192) and first["labels"].min() >= 1
    assert np.allclose(first["mean"], images.images()[:12].transpose(0, 3, 1, 2).reshape(12, -1).mean(0), atol=0)
    downsample(replace(job, format="pickle"), tmp_path / "pickle")
    again = pickle.loads((tmp_path / "pickle/train_data_batch_10").read_bytes())  # our own bytes
    last = np.load(tmp_path / "npz/train_data_batch_10.npz", allow_pickle=False)
    assert again["labels"] == last["labels"].tolist() and np.array_equal(again["data"], last["data"])
    assert open_images(tmp_path / "pickle", split="all").fingerprint == images.fingerprint


@pytest.mark.parametrize("preset", ["edm", "adm"])
def test_edms_container_has_alphabetical_classes(tmp_path: Path, preset: str) -> None:
    source = imagenet(tmp_path / "imagenet", train=2)
    job = Job(source=source, size=8, preset=preset)  # type: ignore[arg-type]
    made = downsample(job, tmp_path / "out")
    assert [f.name for f in made.files] == ["train.zip", "val.zip"]
    images = open_images(tmp_path / "out/train.zip")
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.spec.class_names == ("n01440764", "n02100735", "n02119789")
    assert np.array_equal(images.images()[3], small(source / "train/n02100735/n02100735_1.png", job))


def test_any_number_of_processes_and_an_interruption_make_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = imagenet(tmp_path / "imagenet")
    job = Job(source=source, size=8, preset="chrabaszcz")
    one = downsample(job, tmp_path / "one")
    two = downsample(job, tmp_path / "two", workers=2)
    for a, b in zip(one.files, two.files, strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()
    monkeypatch.setattr(downsampling, "SHARD", 5)
    made: list[int] = []

    def stop(done: int, total: int) -> None:
        made.append(done)
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        downsample(job, tmp_path / "cut", on_progress=stop)
    shutil.move(tmp_path / "imagenet/train/n01440764/n01440764_0.png", tmp_path / "away.png")
    with pytest.raises(UserError, match="holds parts of a job with another files; remove it, or finish it"):
        downsample(job, tmp_path / "cut")
    shutil.move(tmp_path / "away.png", tmp_path / "imagenet/train/n01440764/n01440764_0.png")
    decoded: list[str] = []
    monkeypatch.setattr(downsampling, "small", lambda path, job: decoded.append(str(path)) or small(path, job))
    finished = downsample(job, tmp_path / "cut")
    assert len(decoded) == 15 - 10
    for a, b in zip(one.files, finished.files, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_unusable_files_are_named_or_left_out(tmp_path: Path) -> None:
    source = imagenet(tmp_path / "imagenet")
    (source / "train/n02119789/n02119789_2.png").write_bytes(b"no picture")
    job = Job(source=source, size=8, preset="edm")
    with pytest.raises(UserError, match=r"1 unusable files: .*n02119789_2\.png: damaged"):
        downsample(job, tmp_path / "out")
    made = downsample(job, tmp_path / "out", skip_bad=True)
    assert made.counts["train"] == 11 and len(open_images(tmp_path / "out/train.zip")) == 11


def test_a_flat_validation_set_with_the_kits_list(tmp_path: Path) -> None:
    source = imagenet(tmp_path / "imagenet")
    for folder in list((source / "val").iterdir()):
        for file in folder.iterdir():
            shutil.move(
                file, source / "val" / f"ILSVRC2012_val_{'n02119789 n02100735 n01440764'.index(folder.name)}.png"
            )
        folder.rmdir()
    job = Job(source=source, size=8, preset="chrabaszcz")
    with pytest.raises(UserError, match="has no folders of classes; give the classes of its pictures"):
        downsample(job, tmp_path / "out")
    where = CLSLOC.index("n01440764") + 1
    (tmp_path / "truth.txt").write_text(f"1\n2\n{where}\n")
    downsample(replace(job, val_labels=tmp_path / "truth.txt"), tmp_path / "out")
    names = sorted(p.name for p in (source / "val").iterdir())
    expected = [{"0": 0, "10": 1, "20": where - 1}[n.split("_")[-1].split(".")[0]] for n in names]
    found = open_images(tmp_path / "out", split="val")
    assert sorted(found.labels.tolist()) == sorted(expected)
    (tmp_path / "truth.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match="must hold 3 numbers from 1 to 1000; it has 2"):
        downsample(replace(job, val_labels=tmp_path / "truth.txt"), tmp_path / "other")


def test_what_cannot_be_made_is_said(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    words = ("data", "downsample", tmp_path / "empty", tmp_path / "out", "--size", 8, "--workers", 1, "--preset")
    assert "was never published" in refused(*words, "van-den-oord")
    assert "has no folders of classes" in refused(*words, "edm")
    assert "filter lanczos has no effect on preset edm" in refused(*words, "edm", "--filter", "lanczos")
    assert "filter is 'round'; allowed: box, lanczos, " in refused(*words, "chrabaszcz", "--filter", "round")
    assert "format pickle has no effect" in refused(*words, "adm", "--format", "pickle")
