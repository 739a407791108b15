"""State dicts are read as torch wrote them, in both layouts, and nothing a pickle asks for is executed."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from imagewright.metrics.torch_file import read_state_dict
from imagewright.types import UserError


def state() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    return {
        "plain": torch.randn(2, 3),
        "view": base.view(4, 6)[1:3, ::2],  # shares its storage, with an offset and strides
        "transposed": base.view(4, 6).T,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "half": torch.randn(3).half(),
        "double": torch.randn(3).double(),
        "bfloat": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "byte": torch.tensor([1, 255], dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_reads_what_torch_wrote(tmp_path, as_zip: bool, kind: type) -> None:
    written = state()
    torch.save(kind(written), tmp_path / "a.pth", _use_new_zipfile_serialization=as_zip)
    read = read_state_dict(tmp_path / "a.pth")
    assert list(read) == list(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        torch.testing.assert_close(read[name], tensor.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("as_zip", [True, False])
def test_reads_a_modules_state_dict(tmp_path, as_zip: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))  # carries _metadata
    torch.save(module.state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=as_zip)
    read = read_state_dict(tmp_path / "a.pth")
    assert set(read) == set(module.state_dict())


class Evil:
    def __init__(self, call: object, *arguments: object) -> None:
        self.call = call, arguments

    def __reduce__(self) -> object:
        return self.call


def as_torch_zip(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    return path


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_is_refused_by_name_and_not_run(tmp_path, protocol: int) -> None:
    trace = tmp_path / "trace"
    program = pickle.dumps({"a": Evil(os.mkdir, str(trace))}, protocol=protocol)
    with pytest.raises(UserError, match=r"a\.pth was refused: it asks for (posix|nt)\.mkdir"):
        read_state_dict(as_torch_zip(tmp_path / "a.pth", program))
    assert not trace.exists()


def test_code_in_the_older_layout_is_refused(tmp_path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    head = buffer.getvalue()[: buffer.getvalue().index(b"little_endian") - 40]
    trace = tmp_path / "trace"
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Evil(os.mkdir, str(trace)), protocol=2) + head)
    with pytest.raises(UserError, match="mkdir"):
        read_state_dict(tmp_path / "a.pth")
    assert not trace.exists()


def test_allowed_names_cannot_be_misused(tmp_path) -> None:
    rebuild = torch._utils._rebuild_tensor_v2
    for value in (Evil(OrderedDict, [("a", 1)]), Evil(rebuild, 1, 2, (3,), (1,)), Evil(rebuild, "x")):
        with pytest.raises(UserError, match=r"a\.pth"):
            read_state_dict(as_torch_zip(tmp_path / "a.pth", pickle.dumps({"a": value}, protocol=2)))


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path) -> None:
    torch.save({"a": torch.ones(4)}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "bad.pth", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"K\x04\x85") == 1  # BININT1 4, TUPLE1: the shape (4,)
                content = content.replace(b"K\x04\x85", b"K\x05\x85")
            bad.writestr(name, content)
    with pytest.raises(UserError, match="reaches beyond its storage of 4 elements"):
        read_state_dict(tmp_path / "bad.pth")


def test_no_dictionary_of_tensors(tmp_path) -> None:
    path = tmp_path / "a.pth"
    for value, complaint in [
        ([torch.ones(1)], "a list"),
        ({"a": 1}, "entry a"),
        ({1: torch.ones(1)}, "key 1"),
    ]:
        torch.save(value, path)
        with pytest.raises(UserError, match=complaint):
            read_state_dict(path)


@pytest.mark.parametrize("as_zip", [True, False])
def test_truncated_files_are_refused(tmp_path, as_zip: bool) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "a.pth", _use_new_zipfile_serialization=as_zip)
    content = (tmp_path / "a.pth").read_bytes()
    for keep in range(0, len(content) - 1, 37):
        (tmp_path / "cut.pth").write_bytes(content[:keep])
        with pytest.raises(UserError, match=r"cut\.pth"):
            read_state_dict(tmp_path / "cut.pth")


def test_missing_file(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_state_dict(tmp_path / "none.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_one_of_several_dictionaries(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "weights.pt"
    weights = {"a": torch.arange(3.0), "b": torch.ones(2)}
    content = {"step": 3, "ema": weights, "state": {"net": weights, "empty": {}}, "optimizer": {}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for key in ("ema", "state.net"):
        found = read_state_dict(path, key)
        assert found.keys() == weights.keys() and torch.equal(found["a"], weights["a"])
    for wrong, complaint in (
        (None, "it holds several dictionaries; name one with --part: ema, state"),
        ("state", "name one with --part: net"),
        ("emma", "it has no 'emma'; there are step, ema, state, optimizer"),
        ("step", "is no dictionary of tensors"),
        ("ema.a", "is no dictionary of tensors"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_state_dict(path, wrong, option="--part")
    with pytest.raises(UserError, match="it holds several dictionaries, not tensors alone: ema, state"):
        read_state_dict(path)
