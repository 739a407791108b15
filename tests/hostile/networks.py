"""Hostile pickles of networks, Lightning checkpoints and diffusers settings, by name."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from pickling import Persistent, _module, dumped, network

Evil = dict[str, bytes]
ARGUMENTS = {
    "img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1],
    "num_blocks": 1, "attn_resolutions": [],
}  # fmt: skip


class Call:
    """An object whose pickle calls something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def ema(value: Any) -> bytes:
    return dumped({"ema": value})


def edm(state: dict[str, torch.Tensor] | None = None, name: str = "EDMPrecond", **arguments: Any) -> bytes:
    return ema(
        network(name, {"model.a.weight": torch.zeros(1)} if state is None else state, {**ARGUMENTS, **arguments})
    )


def module(**attributes: Any) -> Persistent:
    return _module("EDMPrecond", {"_init_args": (), "_init_kwargs": dict(ARGUMENTS), **attributes})


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content.encode()


def stored(raw: bytes, shape: bytes = b"(K\x01t", stride: bytes = b"(K\x01t", count: int = 1) -> bytes:
    """{"ema": a network}, whose parameters are views of one storage, of these bytes."""
    head = b"\x80\x04}" + text("ema") + b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}("
    head += text("type") + text("class") + text("class_name") + text("EDMPrecond") + text("state") + b"}("
    head += text("_init_kwargs") + b"}" + text("_parameters") + b"}("
    storage = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(raw)) + raw + b"\x85R"
    views = b"".join(
        text(f"w{i}") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + (storage + b"q\x01" if i == 0 else b"h\x01")
        + b"K\x00" + shape + stride + b"\x89}tR" for i in range(count)
    )  # fmt: skip
    return head + views + b"uuu\x85Rs."


def storage(numbers: int = 1, change: Callable[[bytes], bytes] = lambda b: b) -> bytes:
    out = io.BytesIO()
    torch.save(torch.zeros(numbers).untyped_storage(), out, _use_new_zipfile_serialization=False)
    return change(out.getvalue())


def typed(numbers: int = 1) -> bytes:
    """What `_load_from_bytes` is given: a typed storage in the older layout."""
    out = io.BytesIO()
    torch.save(torch.zeros(numbers).storage(), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def _itself() -> Persistent:
    whole = module()
    whole.state["_modules"]["again"] = whole
    return whole


def _shared() -> Persistent:
    below = module()
    for _ in range(20):
        above = module()
        above.state["_modules"] |= {str(i): below for i in range(10)}
        below = above
    return below


def _deep(levels: int) -> Persistent:
    below = module()
    for _ in range(levels):
        above = module()
        above.state["_modules"]["a"] = below
        below = above
    return below


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


_LONG = b"\x8a\x08" + struct.pack("<q", 1 << 40)


def hostile() -> Evil:
    """Every pickle by name; each has to be refused."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good, two = typed(), typed(2)
    steps = b"\x80\x02" + b"]0" * 400_000 + b"."
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    return {
        "system": pickle.dumps({"ema": Call(os.system, "touch OWNED")}),
        "eval": pickle.dumps({"ema": Call(eval, "__import__('os').system('touch OWNED')")}, 2),
        "exec": pickle.dumps({"a": [Call(exec, "open('OWNED','w')")]}, 4),
        "popen": pickle.dumps({"ema": Call(subprocess.Popen, ["touch", "OWNED"])}),
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncos\n\x8c\x06system\x86R.",
        "torch-load": pickle.dumps({"ema": Call(torch.load, "network.pkl")}),
        "source": ema(Persistent("EDMPrecond", {"_init_args": (), "_init_kwargs": {}})),
        "instance": b"\x80\x02(ios\nsystem\n.",
        "object": b"\x80\x02(cos\nsystem\no.",
        "newobj": b"\x80\x04ctorch.nn.modules.container\nModuleDict\n(K\x01t\x81.",
        "newobj-ex": b"\x80\x04ctorch.nn.modules.container\nModuleDict\n)}\x92.",
        "newobj-persistent": b"\x80\x04ctorch_utils.persistence\n_reconstruct_persistent_obj\n)\x81.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent-id": b"\x80\x02(" + text("storage") + b"tQ.",
        "persistent-text": b"Pabc\n.",
        "frozenset": b"\x80\x04(K\x01\x91.",
        "set-of-tuples": b"\x80\x04\x8f((K\x01tt\x90.",
        "meta-none": b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\nN\x85R.",
        "meta-many": b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}}\x86R.",
        "meta-empty": b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R.",
        "name": ema(Persistent("\x1b[31mEvil\u202e", {"_init_args": (), "_init_kwargs": {}})),
        "class": edm(name="StyleGAN"),
        "state-list": ema(Persistent("EDMPrecond", {"_init_args": (), "_init_kwargs": {}, "_modules": [1]})),
        "parameters-list": ema(module(_parameters=[1])),
        "parameter-text": ema(module(_parameters={"a": "text"})),
        "parameter-key": ema(module(_parameters={3: torch.zeros(1)})),
        "module-number": ema(module(_modules={"a": 3})),
        "positional": ema(module(_init_args=(8, 1))),
        "no-arguments": ema(module(_init_kwargs=None)),
        "arguments-deep": edm(channel_mult=_nested(40)),
        "arguments-many": edm(channel_mult=[1] * 100_000),
        "arguments-tensor": edm(channel_mult=torch.ones(3)),
        "arguments-key": ema(module(_init_kwargs={3: 3})),
        "width": edm(model_channels=1 << 40),
        "wide": edm(model_channels=1 << 20),
        "levels": edm(channel_mult=[1] * 4000),
        "depth": edm(num_blocks=1 << 20),
        "resolution": edm(img_resolution=1 << 30),
        "classes": edm(label_dim=1 << 19),
        "fraction": edm(model_channels=8.5),
        "text": edm(model_channels="8"),
        "range": edm(sigma_min="low"),
        "table": edm(name="iDDPMPrecond", M=10**9),
        "edm2-width": edm(name="Precond", label_dim=0, model_channels=1 << 20),
        "edm2-multiples": edm(name="Precond", label_dim=0, channel_mult=[[1]]),
        "nan": edm({"model.a.weight": torch.tensor([float("nan")])}),
        "itself": ema(_itself()),
        "shared": ema(_shared()),
        "deep": ema(_deep(60)),
        "wide-tree": ema(module(_modules=OrderedDict((str(i), module()) for i in range(30_000)))),
        "no-network": dumped({"G": 1}),
        "network-number": ema(3),
        "network-tensor": ema(torch.zeros(2)),
        "list": dumped([1, 2]),
        "storage-garbage": stored(b"garbage"),
        "storage-code": stored(pickle.dumps(Call(os.system, "touch OWNED"))),
        "storage-in-storage": stored(inner + inner + stored(good)),
        "storage-untyped": stored(storage()),
        "storage-cut": stored(good[:-3]),
        "storage-lying": stored(good.replace(struct.pack("<q", 1), struct.pack("<q", 1 << 60))),
        "storage-short": stored(good, b"(K\x09t"),
        "storage-negative": stored(two, b"(K\x02t", b"(J\xff\xff\xff\xfft"),
        "storage-expands": stored(good, b"(" + _LONG + b"t", b"(K\x00t"),
        "storage-expands-many": stored(good, b"(J\x00\x00\x10\x00t", b"(K\x00t", count=500),
        "storage-dimensions": stored(good, b"(" + b"K\x01" * 1000 + b"t", b"(" + b"K\x00" * 1000 + b"t"),
        "storage-steps": b"\x80\x02(" + (b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(steps)) + steps
                                         + b"\x85R") * 5 + b"t.",
        "scalar-object": b"\x80\x04cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("O8") + b"\x85RB"
                         + struct.pack("<I", 8) + b"\0" * 8 + b"\x86R.",
        "scalar-short": b"\x80\x04cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x85RC\x01a\x86R.",
        "bytes-8": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",
        "bytes-4": b"\x80\x02B\xff\xff\xff\x7fabc.",
        "bytearray-8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
        "text-8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 33) + b"abc.",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
        "line": b"c" + b"a" * 1_000_000,
        "memo": b"\x80\x02h\x09.",
        "memo-huge": b"\x80\x02}r\xff\xff\xff\xff0.",
        "underflow": b"\x80\x02R.",
        "mark": b"\x80\x02t.",
        "buffers": b"\x80\x05\x97.",
        "steps": b"\x80\x02" + b"]0" * 600_000 + b".",
        "doubled": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b".",
        "key": b"\x80\x02}" + b")q\x00h\x00\x86" * 3 + b"K\x01s.",
    }  # fmt: skip


def _zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", content + b"\0" * (64 << 20))
    return out.getvalue()


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "zeros": lambda b: b"\0" * 1000,
    "half": lambda b: b[: len(b) // 2],
    "no-stop": lambda b: b[:-1],
    "zip": _zipped,
    "gzip": lambda b: gzip.compress(b),
    "class": lambda b: b.replace(b"_reconstruct_persistent_obj", b"_reconstruct_persistent_obi"),
    "container": lambda b: b.replace(b"collections", b"collectionz"),
    "storages": lambda b: b.replace(b"_load_from_bytes", b"_load_from_bytez"),
    "names": lambda b: b.replace(b"EDMPrecond", b"EDMPrecont"),
    "type": lambda b: b.replace(b"FloatStorage", b"FloatStoragf"),
    "key": lambda b: b.replace(b"ema", b"emb"),
    "layers": lambda b: b.replace(b"map_layer0", b"map_layer9"),
}
"""Changes of a whole pickle, each to be refused."""

LIGHTNING: Evil = {
    "code": b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch OWNED\x85R.",
    "models": b"\x80\x02}X\x0a\x00\x00\x00state_dictcmodels.x\ny\n)Rs.",
    "posix": b"\x80\x02cposix\nsystem\n.",
    "omegaconf": b"\x80\x02comegaconf.x\ny\n(K\x01t\x81.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
    "no-state": b"\x80\x02}X\x01\x00\x00\x00aK\x01s.",
}
DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "width": ("unet/config.json", {"block_out_channels": [1 << 40]}),
    "wide": ("unet/config.json", {"block_out_channels": [1 << 20]}),
    "blocks": ("unet/config.json", {"layers_per_block": 1 << 20}),
    "levels": ("unet/config.json", {"block_out_channels": [8] * 4000}),
    "side": ("unet/config.json", {"sample_size": 1 << 40}),
    "classes": ("unet/config.json", {"num_class_embeds": 1 << 19}),
    "groups": ("unet/config.json", {"norm_num_groups": 0}),
    "kind": ("unet/config.json", {"_class_name": "os.system"}),
    "block": ("unet/config.json", {"down_block_types": [["DownBlock2D"]]}),
    "steps": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
    "beta": ("scheduler/scheduler_config.json", {"beta_start": "low"}),
    "schedule": ("scheduler/scheduler_config.json", {"beta_schedule": {}}),
    "betas": ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 1000}),
    "consistency": (
        "scheduler/scheduler_config.json",
        {"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 9, "sigma_max": 1},
    ),
}
