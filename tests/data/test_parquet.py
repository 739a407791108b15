"""Pictures in parquet files, as the hub keeps them."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imagewright.data import info, open_images
from imagewright.data.parquet import open_parquet
from imagewright.types import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def write(path: Path, rows: range, *, label: str = "label", names: bool = True, **more: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [{"bytes": png(PIXELS[i]), "path": f"{i}.png"} for i in rows]
    table = pa.table({"image": pictures, label: [i % 3 for i in rows], **more})
    if names:
        features = {label: {"names": ["cat", "dog", "bird"], "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3)


def test_a_set_of_the_hub_is_that_of_its_pictures(tmp_path: Path) -> None:
    write(tmp_path / "data/train-00000-of-00002.parquet", range(4), text=list("abcd"))
    write(tmp_path / "data/train-00001-of-00002.parquet", range(4, 8), text=list("efgh"))
    write(tmp_path / "data/test-00000-of-00001.parquet", range(8, 10), text=list("ij"))
    images = open_images(tmp_path)
    assert np.array_equal(images.images(), PIXELS[:8]) and images.labels.tolist() == [i % 3 for i in range(8)]
    assert images.spec.class_names == ("cat", "dog", "bird") and images.captions == tuple("abcdefgh")
    test = open_images(tmp_path, split="test", resolution=4)
    assert test.labels.tolist() == [2, 0] and test.spec.shape == (3, 4, 4)
    assert info(tmp_path).per_split == {"train": 8, "test": 2}
    assert open_images(tmp_path, labels=False).spec.num_classes == 0


def test_one_file_of_bytes_without_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"jpg": [png(p) for p in PIXELS]}), tmp_path / "a.parquet")
    monkeypatch.setattr("imagewright.data.opening.KEEP_DECODED", 0)
    images = open_images(tmp_path / "a.parquet")
    assert not images.in_memory and np.array_equal(images.images(np.array([9, 0, 9])), PIXELS[[9, 0, 9]])
    assert images.spec.num_classes == 0 and images.splits is None


def test_other_processes_can_be_given_what_reads(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", range(10))
    found = open_parquet(tmp_path / "a.parquet", labels=True)
    assert found is not None
    archive = found[0]
    again = pickle.loads(pickle.dumps(archive.read))  # our own object
    assert [again(n) for n in archive.pictures] == [png(p) for p in PIXELS]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"label": [1, 2]}, "has columns label, none of which holds pictures"),
        ({"image": [{"bytes": None, "path": "x.png"}]}, "holds no bytes: the picture lies elsewhere"),
        ({"image": [b"no picture"]}, "0:0: not a picture"),
        ({"image": [png(PIXELS[0])], "label": [-1]}, "its class is -1; it must be from 0"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, table: dict[str, list[Any]], words: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=words):
        open_images(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "a.parquet", range(10))
    content = (tmp_path / "a.parquet").read_bytes()
    bad = {"cut": content[: len(content) // 2], "noise": b"PAR1" + bytes(99) + b"PAR1", "empty": b""}[damage]
    (tmp_path / "a.parquet").write_bytes(bad)
    with pytest.raises(UserError, match=r"a\.parquet is no readable parquet file"):
        open_images(tmp_path / "a.parquet")


def test_an_old_pyarrow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", range(3))
    monkeypatch.setattr(pa, "__version__", "13.0.0")
    with pytest.raises(UserError, match=r"pyarrow 13\.0\.0 may execute what a file holds"):
        open_images(tmp_path / "a.parquet")
