"""Hostile files of every reader, made by a script: `cases(sources)` gives each with the command that opens it.

None is kept in the repository. A case copies what is whole and changes one thing; whatever the change, the command has
to end well or refuse in one sentence, and do nothing else (`watch`).
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sources import png

from imagewright.cli.main import main
from imagewright.data.couplings import Couplings
from imagewright.data.opening import open_images
from imagewright.metrics.features import read_classifier
from imagewright.metrics.records import read_scores
from imagewright.metrics.statistics import load_moments
from imagewright.metrics.torch_file import read_state_dict
from imagewright.models.files import load_model, weights_hash
from imagewright.report.collect import _read
from imagewright.training.checkpoint import load_checkpoint
from imagewright.training.log import read_log
from imagewright.training.weights import combine

Action = Callable[[], Any]
EVIL = "\x1b]0;owned\x07\x1b[31m[bold]\u202e\udce9\nimagewright: all is well"


@dataclass(frozen=True)
class Case:
    """name: unique. make: writes the file into a folder that holds copies of the sources. act: opens it.

    harmless: it may be taken as it is; all others have to be refused.
    """

    name: str
    make: Callable[[Path], Any]
    act: Callable[[Path], Any]
    harmless: bool = False


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _json()
    yield from _no_regular_files()
    yield from _models()
    yield from _checkpoints()
    yield from _runs()
    yield from _couplings()
    yield from _torch_files()
    yield from _official_files()
    # `data info` leaves out what it cannot use, and says so.
    yield from (replace(case, harmless=True) for group in (_pictures, _labels, _archives) for case in group())
    yield from _arrays()
    yield from _outputs()


def command(*words: str) -> Callable[[Path], Any]:
    """The action of a command line, in the case's folder."""
    return lambda folder: main(list(words))


def _load(name: str, folder: Path) -> None:
    load_model(folder / name)


def _report(folder: Path) -> None:
    _read(folder / "run", {})


SAMPLE = command("sample", "model", "--n", "1", "--out", "out")
RESUME = command("train", "--resume", "run", "--training.total-images", "16")
INFO = command("data", "info", "pictures")
IMPORT = command("import", "weights.pt", "--config", "config.json", "--out", "out")
PICKLED = command("import", "network.pkl", "--out", "out")
PIPELINE = command("import", "pipeline", "--out", "out")
TUNED = command("sample", "model", "--n", "1", "--sampler", "tuned.json", "--out", "out")

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "model": ("old/model.json", partial(_load, "old")),
    "experiment": ("run/experiment.json", _report),
    "resumed": ("run/experiment.json", RESUME),
    "log": ("run/log.jsonl", lambda f: read_log(f / "run/log.jsonl")),
    "metrics": ("metrics.json", lambda f: read_scores(f / "metrics.json")),
    "manifest": ("pairs/manifest.json", lambda f: Couplings(f / "pairs").read([0])),
    "labels": ("pictures/dataset.json", lambda f: open_images(f / "pictures")),
    "tuned": ("tuned.json", TUNED),
    "official": ("config.json", IMPORT),
    "unet": ("pipeline/unet/config.json", PIPELINE),
    "scheduler": ("pipeline/scheduler/scheduler_config.json", PIPELINE),
}
"""Of each kind of JSON: where it lies, and what reads it."""

BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "bytes": lambda b: b"\xff\xfe\x00{" + b,
    "cut": lambda b: b[: len(b) // 2],
    "deep-lists": lambda b: b"[" * 200_000 + b"]" * 200_000,
    "deep-objects": lambda b: b'{"a":' * 100_000 + b"0" + b"}" * 100_000,
    "deep-inside": lambda b: b.rstrip().rstrip(b"}") + b', "more": ' + b"[" * 500 + b"]" * 500 + b"}",
    "list": lambda b: b"[]",
    "null": lambda b: b"null",
    "text": lambda b: b'"\\ud800\\u001b[31m"',
    "nan": lambda b: b'{"format": NaN}',
    "infinite": lambda b: b'{"format": 1e999}',
    "long-number": lambda b: b'{"format": ' + b"9" * 5000 + b"}",
    "many": lambda b: b"[" + b"[]," * 3_200_000 + b"0]",
}


def _json() -> Iterator[Case]:
    for reader, (path, act) in READERS.items():
        for name, change in BYTES.items():
            if name == "many" and reader not in ("model", "labels"):
                continue  # all have the same limit
            yield Case(f"json-{reader}-{name}", partial(_rewrite, path, change), act, harmless=reader == "log")
        if reader not in ("log", "resumed"):
            yield Case(
                f"json-{reader}-each-key", partial(_rewrite, path, lambda b: b), partial(_each_key, path, act), True
            )


def _rewrite(path: str, change: Callable[[bytes], bytes], folder: Path) -> None:
    (folder / path).write_bytes(change((folder / path).read_bytes()))


WRONG = (None, True, -1, 2**70, 0.5, "inf", EVIL, [], [[]], {}, {"class": EVIL}, [None] * 3)


def _each_key(path: str, act: Callable[[Path], Any], folder: Path) -> None:
    """Every value in the file, at two levels, as what it should not be, a third of WRONG each."""
    from imagewright.types import UserError

    whole = json.loads((folder / path).read_text())
    places = [(k,) for k in whole] + [(k, j) for k, v in whole.items() if isinstance(v, dict) for j in v]
    for i, keys in enumerate(places):
        for value in WRONG[i % 3 :: 3]:
            changed = json.loads(json.dumps(whole))
            inner = changed if len(keys) == 1 else changed[keys[0]]
            inner[keys[-1]] = value
            (folder / path).write_text(json.dumps(changed))
            shutil.rmtree(folder / "out", ignore_errors=True)
            try:
                act(folder)
            except UserError:
                pass
            except SystemExit as ended:
                if ended.code not in (0, 2):
                    raise


def edited(path: str, **changes: Any) -> Callable[[Path], None]:
    """A change of some entries of a JSON file; "a.b" is an entry within another."""

    def make(folder: Path) -> None:
        value = json.loads((folder / path).read_text())
        _change(value, changes)
        (folder / path).write_text(json.dumps(value))

    return make


def _change(value: Any, changes: dict[str, Any]) -> None:
    for key, new in changes.items():
        *parents, last = key.split(".")
        inner = value
        for parent in parents:
            inner = inner[parent]
        inner[last] = new


def described(**changes: Any) -> Callable[[Path], None]:
    """The same of the description in a model's weights."""

    def make(folder: Path) -> None:
        path = folder / "model/model.safetensors"
        value = json.loads((folder / "model/model.json").read_text())
        _change(value, changes)
        save_file(load_file(path), path, metadata={"imagewright": json.dumps(value)})

    return make


# --- what is no regular file ----------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[Path], Any]] = {
    "fifo": lambda p: os.mkfifo(p),
    "socket": lambda p: socket.socket(socket.AF_UNIX).bind(os.path.relpath(p)),
    "zero": lambda p: p.symlink_to("/dev/zero"),
    "terminal": lambda p: p.symlink_to("/dev/tty"),
    "folder": lambda p: p.mkdir(),
    "loop": lambda p: p.symlink_to(p.name),
    "dangling": lambda p: p.symlink_to("nowhere"),
}
FILES = {
    **{name: where for name, where in READERS.items() if name != "resumed"},
    "weights": ("model/model.safetensors", partial(_load, "model")),
    "checkpoint": ("run/checkpoints/state-000000000016.safetensors", RESUME),
    "shard": ("pairs/shard-000000.safetensors", lambda f: Couplings(f / "pairs").read([0])),
    "torch": ("weights.pt", IMPORT),
    "pickled": ("network.pkl", PICKLED),
    "moments": ("moments.npz", lambda f: load_moments(f / "moments.npz")),
    "picture": ("pictures/0.png", INFO),
    "array": ("set.npz", command("data", "info", "set.npz")),
    "zip": ("set.zip", command("data", "info", "set.zip")),
    "snapshot": ("run/samples/000000000016.png", _report),
    "edited": ("one.png", command("edit", "colorize", "model", "--image", "one.png", "--out", "out")),
    "sampled": ("out/000000.png", SAMPLE),
}


def _no_regular_files() -> Iterator[Case]:
    for name, (path, act) in FILES.items():
        for kind, put in OTHERS.items():
            if kind in ("terminal", "dangling", "loop") and name not in ("model", "weights", "picture"):
                continue
            missing = (name, kind) in (("labels", "folder"), ("sampled", "folder"))
            yield Case(f"file-{name}-{kind}", partial(_put, path, put), act, harmless=missing)


def _put(path: str, put: Callable[[Path], Any], folder: Path) -> None:
    place = folder / path
    place.parent.mkdir(exist_ok=True, parents=True)
    if place.exists():
        place.unlink()
    before = Path.cwd()
    os.chdir(folder)  # a socket's name is short
    try:
        put(place)
    finally:
        os.chdir(before)


# --- models ---------------------------------------------------------------------------------------------------------


def _models() -> Iterator[Case]:
    lies: dict[str, Any] = {
        "width": {"model.network.config.model_channels": 1 << 20},
        "huge-width": {"model.network.config.model_channels": 1 << 40},
        "depth": {"model.network.config.num_blocks": 1_000_000},
        "levels": {"model.network.config.channel_mult": [1] * 4000},
        "multiples": {"model.network.config.channel_mult": [1 << 20]},
        "classes": {"model.network.config.label_dim": 1 << 20},
        "resolution": {"data.resolution": 16384},
        "network-resolution": {"model.network.config.img_resolution": 1 << 20, "data.resolution": 16384},
        "channels": {"data.channels": 1 << 14},
        "data-classes": {"data.num_classes": 65536},
        "class-names": {"data.class_names": [EVIL] * 3},
        "nested": {"model": {"class": "EDMPrecond", "network": {"class": "EDMPrecond", "network": {}}}},
        "table": {"model": {"class": "iDDPMPrecond", "network": {}, "M": 1_000_000}},
        "class": {"model.class": EVIL},
        "dunder": {"model.class": "__import__"},
        "sampler": {"sampler": {"class": EVIL, "num_steps": 3}},
        "sampler-steps": {"sampler": {"class": "heun", "num_steps": "9" * 40}},
        "kind": {"kind": "codec"},
    }
    for name, changes in lies.items():
        act = SAMPLE if name.startswith("sampler") else partial(_load, "model")
        ignored = name == "data-classes"  # the network knows no classes, and labels are ignored
        yield Case(f"model-{name}", described(**changes), act, harmless=ignored)
    for name, change in _TENSORS.items():
        yield Case(f"model-weights-{name}", partial(_reweighted, change), partial(_load, "model"))
    for name, change in BYTES.items():
        act = partial(_load, "model")
        yield Case(f"model-description-{name}", partial(_redescribed, change), act)
    for name, change in _SAFETENSORS.items():
        path = "model/model.safetensors"
        yield Case(f"model-safetensors-{name}", partial(_rewrite, path, change), partial(_load, "model"))


def _poison(state: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
    name = next(k for k, v in state.items() if v.is_floating_point())
    return state | {name: torch.full_like(state[name], value)}


_TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "nan": lambda s: _poison(s, float("nan")),
    "infinite": lambda s: _poison(s, float("inf")),
    "integers": lambda s: {k: v.long() for k, v in s.items()},
    "short": lambda s: {k: v.flatten()[:1] for k, v in s.items()},
    "none": lambda s: {},
    "more": lambda s: s | {EVIL.replace("\udce9", ""): torch.zeros(3)},
    "transposed": lambda s: {k: v.flatten() for k, v in s.items()},
}


def _reweighted(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], folder: Path) -> None:
    path = folder / "model/model.safetensors"
    state = change(load_file(path))
    save_file(state, path)
    described(weights_sha256=weights_hash(state))(folder)


def _redescribed(change: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "model/model.safetensors"
    text = change((folder / "model/model.json").read_bytes()).decode("utf-8", "replace")
    save_file(load_file(path), path, metadata={"imagewright": text})


def _headed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


_SAFETENSORS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "cut": lambda b: b[:-100],
    "longer": lambda b: b + b"\0" * 100,
    "huge-header": lambda b: struct.pack("<Q", 1 << 62) + b[8:],
    "long-header": lambda b: _headed(b"{" + b" " * (20 << 20) + b"}"),
    "deep-header": lambda b: _headed(b'{"a":' * 100_000),
    "lying-shape": lambda b: _headed({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"\0" * 4),
    "overflow": lambda b: _headed({"a": {"dtype": "F32", "shape": [1 << 33] * 2, "data_offsets": [0, 4]}}, b"\0" * 4),
    "negative": lambda b: _headed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "offsets": lambda b: _headed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
    "type": lambda b: _headed({"a": {"dtype": EVIL, "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "no-entry": lambda b: _headed({"a": 3}),
    "pickle": lambda b: _owned(),
}

# --- checkpoints and runs -------------------------------------------------------------------------------------------

STATE = "run/checkpoints/state-000000000016.safetensors"


def _checkpoints() -> Iterator[Case]:
    for name in ("empty", "cut", "longer", "huge-header", "deep-header", "lying-shape", "pickle"):
        yield Case(f"checkpoint-{name}", partial(_rewrite, STATE, _SAFETENSORS[name]), RESUME)
    for name, change in _STATES.items():
        # By a checksum alone all would be refused: most come with a right one, as who wants to harm would write it.
        signed = name not in ("nan", "wrong-flip", "no-tensors")
        yield Case(f"checkpoint-{name}", partial(_restated, change, signed=signed), RESUME)
    yield Case("checkpoint-flip-signed", partial(_restated, _STATES["wrong-flip"], signed=True), RESUME, harmless=True)
    yield Case("checkpoint-nan-signed", partial(_restated, _STATES["nan"], signed=True), RESUME)
    later = STATE.replace("16.", "32.")
    yield Case("checkpoint-renamed", lambda f: (f / STATE).rename(f / later), RESUME)
    yield Case("checkpoint-loaded", lambda f: None, lambda f: load_checkpoint(f / STATE), harmless=True)
    yield Case("weights-nan", _kept_weights, lambda f: combine([f / "raw.safetensors"], [1.0]))


def _kept_weights(folder: Path) -> None:
    save_file({"a": torch.tensor([float("nan")])}, folder / "raw.safetensors")


def _cut_moments(state: dict[str, torch.Tensor], head: Any) -> dict[str, torch.Tensor]:
    return {k: v.flatten()[:1].clone() if k.endswith("/exp_avg") else v for k, v in state.items()}


_STATES: dict[str, Callable[[dict[str, torch.Tensor], Any], dict[str, torch.Tensor]]] = {
    "short-moments": _cut_moments,
    "double-moments": lambda s, h: {k: v.double() if k.endswith("/exp_avg_sq") else v for k, v in s.items()},
    "nan": lambda s, h: _poison(s, float("nan")),
    "no-tensors": lambda s, h: {},
    "step": lambda s, h: h["state"].update(step=-5) or s,
    "images": lambda s, h: h["state"].update(images="many") or s,
    "clock": lambda s, h: h["state"].update(step=10**15) or s,
    "learners": lambda s, h: h["state"].update(learners={EVIL: {}}) or s,
    "optimiser": lambda s, h: h["state"]["learners"]["denoiser"].update(optimizer={EVIL: {"step": 1}}) or s,
    "averages": lambda s, h: h["state"]["learners"]["denoiser"].update(averages=[]) or s,
    "scaler": lambda s, h: h["state"]["learners"]["denoiser"].update(scaler={"scale": EVIL}) or s,
    "other-run": lambda s, h: h.update(run="0" * 64) or s,
    "rows-gone": lambda s, h: h.update(rows=["0" * 64] * 2) or s,
    "rows-no-list": lambda s, h: h.update(rows={"0": EVIL}) or s,
    "rows-unnamed": lambda s, h: h["state"].update(targets={"x": {"$rows": ["x"]}}) or s,
    "tensor-unnamed": lambda s, h: h["state"].update(targets={"x": {"$tensor": ["x"]}}) or s,
    "wrong-flip": lambda s, h: {k: -v if v.is_floating_point() else v for k, v in s.items()},
}


def _restated(change: Callable[..., dict[str, torch.Tensor]], folder: Path, signed: bool = False) -> None:
    """A changed state; signed: with the checksum of what it now is."""
    from safetensors import safe_open

    from imagewright.training.checkpoint import _checksum

    path = folder / STATE
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["imagewright"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    tensors = change(tensors, head)
    if signed:
        head["sha256"] = _checksum(head["state"], tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"imagewright": json.dumps(head)})


def _runs() -> Iterator[Case]:
    owned = "import pathlib; pathlib.Path('OWNED').touch()"
    record = "run/experiment.json"

    def with_code(folder: Path) -> None:
        (folder / "run/evil.py").write_text(owned)
        edited(record, command=["run/evil.py", "--out", "/tmp/owned"])(folder)

    yield Case("run-code", with_code, RESUME, harmless=True)
    lies: dict[str, Any] = {
        "command": {"command": [EVIL, "--help"]},
        "command-kind": {"command": "rm -rf /"},
        "class": {"experiment.class": "Popen"},
        "method": {"experiment.method": {"class": "Path", "x": "/"}},
        "private": {"experiment.method.class": "_Unknown"},
        "batch": {"experiment.training.batch": "many"},
        "batch-size": {"experiment.training.batch": 2**62},
        "rate": {"experiment.training.optimizer.lr": [1]},
        "network": {"experiment.network.model_channels": "8"},
        "source": {"experiment.data.source": EVIL},
        "device": {"experiment.data.source": "/dev/zero"},
        "inputs": {"inputs": {"data": {"where": "/dev/zero", "fingerprint": EVIL}}},
        "inputs-kind": {"inputs": [1]},
    }
    for name, changes in lies.items():
        yield Case(f"run-{name}", edited(record, **changes), RESUME, harmless=name == "command")
    line = json.dumps({"step": 1, "images": 1, EVIL: EVIL}).encode()
    yield Case("log-evil", partial(_write, "run/log.jsonl", line), _report, harmless=True)
    yield Case(
        "log-long", partial(_write, "run/log.jsonl", b'{"step": 1, "images": 1}\n' * 100_000), _report, harmless=True
    )
    yield Case("snapshot-bomb", lambda f: _write("run/samples/000000000016.png", png_bomb(60_000), f), _report)
    yield Case("samples-json", partial(_write, "out/samples.json", b"[1]"), SAMPLE)


# --- pairs ----------------------------------------------------------------------------------------------------------


def _couplings() -> Iterator[Case]:
    read = READERS["manifest"][1]
    shard = "pairs/shard-000000.safetensors"
    lies: dict[str, Any] = {
        "n": {"n": 10**9},
        "one-each": {"n": 10**9, "shard": 1},
        "dtype": {"dtype": EVIL},
        "resolution": {"spec.resolution": 10**6},
        "seed": {"seed": -1},
        "classes": {"spec.num_classes": 1},
    }
    for name, changes in lies.items():
        yield Case(f"pairs-{name}", edited("pairs/manifest.json", **changes), read)
    yield Case("pairs-flipped", partial(_rewrite, shard, lambda b: b[:-1] + bytes([b[-1] ^ 1])), read)
    yield Case(
        "pairs-image-flipped", partial(_rewrite, shard, lambda b: b[:-100] + bytes([b[-100] ^ 1]) + b[-99:]), read
    )
    for name in ("empty", "cut", "huge-header", "lying-shape"):
        yield Case(f"pairs-{name}", partial(_rewrite, shard, _SAFETENSORS[name]), read)


# --- torch files ----------------------------------------------------------------------------------------------------


class _Owned:
    def __reduce__(self) -> Any:
        return os.system, ("touch OWNED",)


def _owned() -> bytes:
    return pickle.dumps(_Owned())


def _pt(program: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A .pt file of one pickle."""
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", program)
        for key, raw in (storages or {}).items():
            archive.writestr(f"a/data/{key}", raw)
    return out.getvalue()


_STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"  # one float, key 0
)


def _viewed(shape: bytes, stride: bytes, offset: bytes = b"K\x00", count: int = 1) -> bytes:
    """{"w0": tensor, ...}: so many views of one storage."""
    entries = b"".join(
        b"X" + struct.pack("<I", len(f"w{i}")) + f"w{i}".encode()
        + b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE + offset + shape + stride + b"\x89}tR"
        for i in range(count)
    )  # fmt: skip
    return _pt(b"\x80\x02}(" + entries + b"u.", {"0": b"\0" * 4})


_LONG = b"\x8a\x08" + struct.pack("<q", 1 << 40)


def _torch_files() -> Iterator[Case]:
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 60  # a tuple of two of itself, sixty deep
    programs: dict[str, bytes] = {
        "code": _owned(),
        "code-in-zip": _pt(_owned()),
        "global": _pt(b"\x80\x02cos\nsystem\n."),
        "global-name": _pt(b"\x80\x02c\x1b[31mos\nsystem\n."),
        "stack-global": _pt(b"\x80\x04\x8c\x02os\x8c\x06system\x93."),
        "stack-kinds": _pt(b"\x80\x02" + doubled + doubled + b"\x93."),
        "instance": _pt(b"\x80\x02(ios\nsystem\n."),
        "object": _pt(b"\x80\x02(cos\nsystem\no."),
        "newobj": _pt(b"\x80\x02cos\nsystem\n)\x81."),
        "extension": _pt(b"\x80\x02\x82\x01."),
        "stride-0": _viewed(b"(" + _LONG + b"t", b"(K\x00t"),
        "stride-0-many": _viewed(b"(J\x00\x00\x10\x00t", b"(K\x00t", count=2000),
        "negative": _viewed(b"(K\x01t", b"(J\xff\xff\xff\xfft"),
        "offset": _viewed(b"(K\x01t", b"(K\x01t", _LONG),
        "overflow": _viewed(b"(" + _LONG * 4 + b"t", b"(" + b"K\x00" * 4 + b"t"),
        "empty-huge": _viewed(b"(" + _LONG * 3 + b"K\x00t", b"(" + b"K\x00" * 4 + b"t"),
        "dimensions": _viewed(b"(" + b"K\x01" * 100_000 + b"t", b"(" + b"K\x00" * 100_000 + b"t"),
        "tuple-key": _pt(b"\x80\x02}" + doubled[2:] + b"K\x01s."),
        "tuple-content": _pt(doubled + b"."),
        "tuple-identity": _pt(doubled + b"Q."),
        "tuple-call": _pt(b"\x80\x02ccollections\nOrderedDict\n" + doubled[2:] + b"R."),
        "marks": _pt(b"\x80\x02" + b"(" * 400_000 + b"t" * 400_000 + b"."),
        "mark-storm": _pt(b"\x80\x02" + b"(" * 200_000 + b"(t0" * 50_000 + b"."),
        "memo": _pt(b"\x80\x02]" + b"q\x00h\x00a" * 300_000 + b"."),
        "memo-list": _pt(b"\x80\x02]q\x00(" + b"h\x00" * 900_000 + b"e."),
        "count": _pt(b"\x80\x02X\xff\xff\xff\x7fabc."),
        "count-8": _pt(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc."),
        "long-4": _pt(b"\x80\x02\x8b\xff\xff\xff\x7fabc."),
        "decimal": _pt(b"\x80\x02L" + b"9" * 100_000 + b"L\n."),
        "no-end": _pt(b"\x80\x02}"),
        "empty-stack": _pt(b"\x80\x02."),
        "underflow": _pt(b"\x80\x02R."),
        "self": _pt(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."),
        "name": _pt(b"\x80\x02}X\x09\x00\x00\x00\x1b[31m\xe2\x80\xaea}s."),
        "two-pickles": _pt(b"\x80\x02}.") + b"PK",
        "empty": b"",
        "zeros": b"\0" * 1000,
        "nested": _pt(b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 100_000 + b"K\x01" + b"s" * 100_000 + b"."),
    }
    for name, content in programs.items():
        yield Case(f"torch-{name}", partial(_write, "weights.pt", content), IMPORT)
    yield Case("torch-nan", _torch_nan, lambda f: read_state_dict(f / "weights.pt"))
    yield Case(
        "torch-legacy-cut", partial(_rewrite, "legacy.pt", lambda b: b[:-7]), lambda f: read_state_dict(f / "legacy.pt")
    )
    for key, value in {"model_channels": 1 << 20, "num_blocks": 1 << 20, "label_dim": 60_000}.items():
        yield Case(f"torch-config-{key}", edited("config.json", **{key: value}), IMPORT)


def _official_files() -> Iterator[Case]:
    """Pickles of networks, Lightning checkpoints, and what a diffusers folder may say of itself."""
    for name, content in networks.hostile().items():
        yield Case(f"network-{name}", partial(_write, "network.pkl", content), PICKLED)
    for name, change in networks.CHANGES.items():
        yield Case(f"network-whole-{name}", partial(_rewrite, "network.pkl", change), PICKLED)
    lightning = command("import", "a.ckpt", "--out", "out")
    for name, program in networks.LIGHTNING.items():
        yield Case(f"lightning-{name}", partial(_write, "a.ckpt", _pt(program)), lightning)
    for name, (path, lies) in networks.DIFFUSERS.items():
        yield Case(f"diffusers-{name}", edited(f"pipeline/{path}", **lies), PIPELINE)


def _torch_nan(folder: Path) -> None:
    torch.save({"a": torch.tensor([float("nan")])}, folder / "weights.pt")


def _write(path: str, content: bytes, folder: Path) -> None:
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(content)


# --- pictures, labels, archives, arrays -----------------------------------------------------------------------------


def png_bomb(side: int) -> bytes:
    """A black PNG of side x side pixels, a thousandth of that in bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" * (side // 8 + 2)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _pictures() -> Iterator[Case]:
    bodies: dict[str, bytes] = {
        "0.png": b"",
        "1.png": b"\x89PNG\r\n\x1a\n" + b"\xff" * 40,
        "2.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(touch OWNED) system\n",
        "3.png": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "4.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + b"\0" * 6 + b"," + b"\0" * 20,
        "5.bmp": b"BM" + b"\xff" * 60,
        "6.tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 200,
        "7.ppm": b"P6 99999 99999 255\n",
        "8.jpg": b"\xff\xd8\xff\xe0" + b"\0" * 64,
        "9.webp": b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 40,
    }
    for name, body in bodies.items():
        yield Case(f"picture-{name}", partial(_write, f"pictures/{name}", body), INFO)
    for side in (6_000, 60_000):
        yield Case(f"picture-bomb-{side}", lambda f, s=side: _write("pictures/9.png", png_bomb(s), f), INFO)
    yield Case("picture-bombs", _many_bombs, INFO)
    yield Case("picture-text", lambda f: _write("pictures/0.png", _with_text(png(8, 8)), f), INFO)
    for i, name in enumerate(
        (EVIL.replace("\n", "") + ".png", "\x1b[2J.png", "[link=x]y.png", "$\\frac{$.png", "a\nb.png")
    ):
        yield Case(f"picture-name-{i}", lambda f, n=name: _write(f"pictures/{n}", b"no picture", f), INFO)
        yield Case(f"other-name-{i}", lambda f, n=name: _write(f"pictures/{n[:-4]}.txt", b"", f), INFO)


def _many_bombs(folder: Path) -> None:
    shutil.rmtree(folder / "pictures")
    (folder / "pictures").mkdir()
    bomb = png_bomb(6_000)
    for i in range(6):
        (folder / f"pictures/{i}.png").write_bytes(bomb)


def _with_text(content: bytes) -> bytes:
    body = zlib.compress(b"A" * (80 << 20), 9)
    data = b"Comment\0\0" + body
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return content[:33] + chunk + content[33:]


def _labels() -> Iterator[Case]:
    path = "pictures/dataset.json"
    entries = [["0.png", 0], ["1.png", 1], ["2.png", 2]]
    values: dict[str, Any] = {
        "largest": [["0.png", 2**63], *entries[1:]],
        "million": [["0.png", 999_999], *entries[1:]],
        "negative": [["0.png", -5], *entries[1:]],
        "names": [[EVIL, 0], *entries],
        "up": [["../../etc/passwd", 0], *entries],
        "many": [[f"{i}.png", 0] for i in range(300_000)],
    }
    for name, labels in values.items():
        yield Case(f"labels-{name}", edited(path, labels=labels), INFO)
    yield Case("labels-classes", edited(path, classes=["c"] * 500_000), INFO)
    yield Case("labels-class-names", edited(path, classes=[EVIL, "[red]b", "$c"]), INFO)
    yield Case("labels-texts", edited(path, pictures={"0.png": {"name": EVIL, "split": EVIL}}), INFO)


def _archives() -> Iterator[Case]:
    look = command("data", "info", "set.zip")
    names = {
        "up": "../../owned.png",
        "absolute": "/tmp/owned.png",
        "drive": "C:\\owned.png",
        "evil": EVIL[:20] + ".png",
    }
    for name, entry in names.items():
        yield Case(f"zip-{name}", partial(_zip, {"0.png": png(8, 8), entry: png(8, 8)}), look)
    yield Case("zip-bomb", _zip_bomb, look)
    yield Case("zip-labels-bomb", _labels_bomb, look)
    yield Case("zip-double", _zip_double, look)
    yield Case("zip-many", lambda f: _zip({f"{i}.txt": b"" for i in range(20_000)} | {"0.png": png(8, 8)}, f), look)
    yield Case("zip-cut", partial(_zip_changed, lambda b: b[:-30]), look)
    yield Case("zip-size", partial(_zip_changed, _lying_size), look)
    yield Case("zip-none", partial(_write, "set.zip", b"PK\x05\x06" + b"\xff" * 18), look)


def _zip(entries: dict[str, bytes], folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name.encode("utf-8", "replace").decode(), content)


def _zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            with archive.open(f"{i}.png", "w", force_zip64=True) as file:
                for _ in range(160):
                    file.write(b"\0" * (1 << 20))


def _labels_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png(8, 8))
        archive.writestr("dataset.json", b'{"labels": [' + b" " * (100 << 20) + b"]}")


def _zip_double(folder: Path) -> None:
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(folder / "set.zip", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("0.png", png(8, 8))
        archive.writestr("0.png", png(8, 8, 1))


def _zip_changed(change: Callable[[bytes], bytes], folder: Path) -> None:
    _zip({"0.png": png(8, 8)}, folder)
    _rewrite("set.zip", change, folder)


def _lying_size(content: bytes) -> bytes:
    at = content.rindex(b"PK\x01\x02")
    return content[: at + 24] + struct.pack("<I", 0xFFFFFFF0) + content[at + 28 :]


def _arrays() -> Iterator[Case]:
    look = command("data", "info", "set.npz")
    read = FILES["moments"][1]
    for name, place, act in (("array", "set.npz", look), ("moments", "moments.npz", read)):
        key = "arr_0" if name == "array" else "mu"
        yield Case(f"npz-{name}-pickle", partial(_npz_pickle, place, key), act)
        yield Case(f"npz-{name}-lying", partial(_npz_lying, place, key, "(1099511627776,)"), act)
        yield Case(f"npz-{name}-lying-2", partial(_npz_lying, place, key, "(-1, 4)"), act)
        yield Case(f"npz-{name}-code", partial(_npz_lying, place, key, "__import__('os').system('touch OWNED')"), act)
        yield Case(f"npz-{name}-long", partial(_npz_lying, place, key, "(" + "1," * 200_000 + ")"), act)
        yield Case(f"npz-{name}-bomb", partial(_npz_bomb, place, key), act)
        yield Case(f"npz-{name}-empty", partial(_write, place, b""), act)
    yield Case("npz-moments-nan", lambda f: np.savez(f / "moments.npz", mu=np.full(2, np.nan), sigma=np.eye(2)), read)
    deep = {"mu": np.zeros(2), "sigma": np.eye(2), "provenance": "[" * 100_000}
    yield Case("npz-moments-text", lambda f: np.savez(f / "moments.npz", **deep), read)
    labelled = {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.array([0, 2**40])}
    yield Case("npz-array-labels", lambda f: np.savez(f / "set.npz", **labelled), look)

    def classify(folder: Path) -> Any:
        return read_classifier(folder / "c.safetensors")

    for name in ("cut", "lying-shape", "deep-header"):
        content = _SAFETENSORS[name](b"\0" * 200)
        yield Case(f"classifier-{name}", partial(_write, "c.safetensors", content), classify)
    lying = {"imagewright": json.dumps({"format": "imagewright/features/1", "config": {"widths": [1 << 30]}})}
    yield Case("classifier-width", lambda f: save_file({}, f / "c.safetensors", metadata=lying), classify)


def _npz_pickle(place: str, key: str, folder: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = _Owned()
    np.savez(folder / place, **{key: array}, sigma=array)


def _npz_lying(place: str, key: str, shape: str, folder: Path) -> None:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text
    with zipfile.ZipFile(folder / place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (key, "sigma"):
            archive.writestr(f"{name}.npy", head + b"\0" * 64)


def _npz_bomb(place: str, key: str, folder: Path) -> None:
    side = 3 << 30
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({side},), }}".encode()
    with zipfile.ZipFile(folder / place, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
            file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)
            file.write(b"\0" * (8 << 20))  # what it says of itself is changed below: three GiB would take long to write
        archive.writestr("sigma.npy", b"")
        archive.infolist()[0].file_size = side


# --- outputs --------------------------------------------------------------------------------------------------------


def _outputs() -> Iterator[Case]:
    convert = command("data", "convert", "pictures", "--out", "out.zip")
    for kind in ("fifo", "socket", "zero", "dangling"):
        yield Case(f"out-{kind}", partial(_put, "out.zip", OTHERS[kind]), convert)
    yield Case("out-link", lambda f: (f / "out.zip").symlink_to(f / "model/model.json"), convert)
    yield Case("out-device", lambda f: None, command("data", "convert", "pictures", "--out", "/dev/null"))
    yield Case("out-device-folder", lambda f: None, command("sample", "model", "--n", "1", "--out", "/dev/null"))
    yield Case("out-grid", partial(_put, "out/grid.png", OTHERS["fifo"]), SAMPLE)
    yield Case("out-record", partial(_put, "out/samples.json", lambda p: p.symlink_to("/etc/hostname")), SAMPLE)
    yield Case("out-log", partial(_put, "run/log.jsonl", OTHERS["fifo"]), RESUME)
