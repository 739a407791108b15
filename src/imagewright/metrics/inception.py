"""The Inception-v3 network of FID (TensorFlow graph of 2015-12-05): 2048 features, 1008 logits.

Source     architecture: Szegedy et al. 2015 (1512.00567); FID: Heusel et al. 2017 (1706.08500).
           Weights: the public port named below, whose parameter names are kept. They are found, or fetched
           from a URL that the user wrote, never silently; files are read without executing the pickle inside
           (`torch_file`).
Quirks     Three things differ from the usual Inception-v3 and belong to FID: average pooling inside blocks
           ignores the padding, the last block pools by maximum, and images are resized by TensorFlow 1's
           bilinear rule, whose pixels sit at their corners. Logits come without the bias, as the original
           Inception score uses them.
Checked    against torch-fidelity's network with random weights: bit for bit equal in float32.
"""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from imagewright.arrays import read_tensors
from imagewright.files import replacing
from imagewright.metrics.features import EncoderFeatures, Images, file_sha256
from imagewright.metrics.torch_file import read_state_dict
from imagewright.models.view import resize_bilinear_tf1, seen
from imagewright.types import Encoding, ModelKind, UserError, View

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INPUT_SIZE = 299


# --- architecture -------------------------------------------------------------------------------------------


class ConvBnRelu(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU; names as in the weight file."""

    def __init__(self, inner: int, outer: int, kernel: tuple[int, int], stride: int, same: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(inner, outer, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outer, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Unit(NamedTuple):
    """One ConvBnRelu of a branch: stride 2 goes without padding, stride 1 keeps the size."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


class Branch(NamedTuple):
    """Optional pooling, units in sequence, then optionally a fork of two units with concatenated outputs."""

    units: tuple[Unit, ...]
    pool: str = ""  # "", "avg" (padding not counted), "max" (both keep the size) or "reduce" (max, stride 2)
    fork: tuple[Unit, ...] = ()


class Block(nn.Module):
    """An Inception block: branches side by side, concatenated along channels in the order given."""

    def __init__(self, inner: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = inner
            for unit in branch.units:
                self._add(width, unit)
                width = unit.width
            for unit in branch.fork:
                self._add(width, unit)

    def _add(self, inner: int, unit: Unit) -> None:
        layer = ConvBnRelu(inner, unit.width, unit.kernel, unit.stride, same=unit.stride == 1)
        self.add_module(unit.name, layer)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for branch in self.branches:
            y = _pool(x, branch.pool)
            for unit in branch.units:
                y = self.get_submodule(unit.name)(y)
            outputs += [self.get_submodule(unit.name)(y) for unit in branch.fork] if branch.fork else [y]
        return torch.cat(outputs, dim=1)


def _pool(x: Tensor, kind: str) -> Tensor:
    if kind == "avg":
        return nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == "max":
        return nn.functional.max_pool2d(x, 3, stride=1, padding=1)
    return nn.functional.max_pool2d(x, 3, stride=2) if kind == "reduce" else x


def _grid35(pooled: int) -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch1x1", 64),)),
        Branch((Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5)))),
        Branch(
            (
                Unit("branch3x3dbl_1", 64),
                Unit("branch3x3dbl_2", 96, (3, 3)),
                Unit("branch3x3dbl_3", 96, (3, 3)),
            )
        ),
        Branch((Unit("branch_pool", pooled),), pool="avg"),
    )


def _to_grid17() -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch3x3", 384, (3, 3), 2),)),
        Branch(
            (
                Unit("branch3x3dbl_1", 64),
                Unit("branch3x3dbl_2", 96, (3, 3)),
                Unit("branch3x3dbl_3", 96, (3, 3), 2),
            )
        ),
        Branch((), pool="reduce"),
    )


def _grid17(narrow: int) -> tuple[Branch, ...]:
    wide, tall = (1, 7), (7, 1)
    return (
        Branch((Unit("branch1x1", 192),)),
        Branch(
            (
                Unit("branch7x7_1", narrow),
                Unit("branch7x7_2", narrow, wide),
                Unit("branch7x7_3", 192, tall),
            )
        ),
        Branch(
            (
                Unit("branch7x7dbl_1", narrow),
                Unit("branch7x7dbl_2", narrow, tall),
                Unit("branch7x7dbl_3", narrow, wide),
                Unit("branch7x7dbl_4", narrow, tall),
                Unit("branch7x7dbl_5", 192, wide),
            )
        ),
        Branch((Unit("branch_pool", 192),), pool="avg"),
    )


def _to_grid8() -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2))),
        Branch(
            (
                Unit("branch7x7x3_1", 192),
                Unit("branch7x7x3_2", 192, (1, 7)),
                Unit("branch7x7x3_3", 192, (7, 1)),
                Unit("branch7x7x3_4", 192, (3, 3), 2),
            )
        ),
        Branch((), pool="reduce"),
    )


def _grid8(pool: str) -> tuple[Branch, ...]:
    return (
        Branch((Unit("branch1x1", 320),)),
        Branch(
            (Unit("branch3x3_1", 384),),
            fork=(Unit("branch3x3_2a", 384, (1, 3)), Unit("branch3x3_2b", 384, (3, 1))),
        ),
        Branch(
            (Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, (3, 3))),
            fork=(Unit("branch3x3dbl_3a", 384, (1, 3)), Unit("branch3x3dbl_3b", 384, (3, 1))),
        ),
        Branch((Unit("branch_pool", 192),), pool=pool),
    )


class InceptionV3(nn.Module):
    """[N, 3, 299, 299] from `preprocess` -> features [N, 2048], logits without bias [N, 1008]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBnRelu(3, 32, (3, 3), 2, same=False)
        self.Conv2d_2a_3x3 = ConvBnRelu(32, 32, (3, 3), 1, same=False)
        self.Conv2d_2b_3x3 = ConvBnRelu(32, 64, (3, 3), 1, same=True)
        self.Conv2d_3b_1x1 = ConvBnRelu(64, 80, (1, 1), 1, same=False)
        self.Conv2d_4a_3x3 = ConvBnRelu(80, 192, (3, 3), 1, same=False)
        self.Mixed_5b = Block(192, _grid35(32))
        self.Mixed_5c = Block(256, _grid35(64))
        self.Mixed_5d = Block(288, _grid35(64))
        self.Mixed_6a = Block(288, _to_grid17())
        self.Mixed_6b = Block(768, _grid17(128))
        self.Mixed_6c = Block(768, _grid17(160))
        self.Mixed_6d = Block(768, _grid17(160))
        self.Mixed_6e = Block(768, _grid17(192))
        self.Mixed_7a = Block(768, _to_grid8())
        self.Mixed_7b = Block(1280, _grid8("avg"))
        self.Mixed_7c = Block(2048, _grid8("max"))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _pool(x, "reduce")
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = _pool(x, "reduce")
        for name, block in self.named_children():
            if name.startswith("Mixed_"):
                x = block(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


# --- input --------------------------------------------------------------------------------------------------


def preprocess(images: Images, dtype: torch.dtype, device: torch.device) -> Tensor:
    """uint8 [n, H, W, 1 or 3] -> [n, 3, 299, 299], (x - 128) / 128. Grey images repeat their channel."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(f"images must be uint8 [n, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).to(dtype)
    return (resize_bilinear_tf1(x, (INPUT_SIZE, INPUT_SIZE)).expand(-1, 3, -1, -1) - 128) / 128


# --- weights and extractor ----------------------------------------------------------------------------------


class Inception(nn.Module):
    """The network as a `types.Encoder`, whose 2048 features are both pooled and all there is: it gives no tokens."""

    kind: ClassVar[ModelKind] = "encoder"
    view = View(side=INPUT_SIZE, channels=3, resize="tensorflow", mean=(128 / 255,), std=(128 / 255,))

    def __init__(self, network: InceptionV3) -> None:
        super().__init__()
        self.network = network

    def encode(self, images: Tensor) -> Encoding:
        """[N, C, H, H] in [-1, 1] -> features [N, 2048], and logits [N, 1008]."""
        features, logits = self.network(seen(images, self.view))
        return Encoding(features, logits=logits)


class InceptionFeatures(EncoderFeatures):
    """The `FeatureExtractor` of FID. `official` says whether the weights are those FID is defined by.

    source: path of a torch.save or safetensors file, or a URL (see `locate_weights`).
    dtype:  torch.float32 as everybody computes FID, or torch.float64.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        cache: Path | None = None,
        expected_sha256: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        path = locate_weights(source, cache=cache, expected_sha256=expected_sha256)
        sha256 = file_sha256(path)
        self.official = sha256 == WEIGHTS_SHA256
        super().__init__(
            Inception(load_network(path)),
            name="inception-2015-12-05" if self.official else f"inception-{sha256[:8]}",
            sha256=sha256,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    def encoded(self, images: Images) -> Encoding:
        """Of 8-bit pictures, by the original's own arithmetic to the last bit."""
        features, logits = self.encoder.network(preprocess(images, self._dtype, self._device))
        return Encoding(features, logits=logits)


def load_network(path: Path) -> InceptionV3:
    """The network with a file's weights, in eval mode; raises UserError when the tensors do not fit."""
    state = read_tensors(path) if path.suffix == ".safetensors" else read_state_dict(path)
    network = InceptionV3()
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    needed = {name for name in wanted if not name.endswith("num_batches_tracked")}  # eval mode never reads those
    wrong = sorted((needed - set(state)) | (set(state) - set(wanted)))
    wrong += sorted(name for name in needed & set(state) if state[name].shape != wanted[name])
    if wrong:
        raise UserError(
            f"{path} does not hold the FID Inception weights: {len(wrong)} tensors differ, first {wrong[0]}"
        )
    network.load_state_dict(state, strict=False)
    return network.requires_grad_(False).eval()


def locate_weights(source: str | Path, *, cache: Path | None = None, expected_sha256: str | None = None) -> Path:
    """The local file of a path or of an http(s) URL, its checksum verified.

    A folder stands for the one file of weights (.pth, .pt, .safetensors) in it.
    A URL is fetched once into `cache` (default: torch.hub's checkpoint folder); a path is never fetched. The
    checksum is `expected_sha256`, else the 8 or more hexadecimal digits that the file name carries
    (name-6726825d.pth), else free. Raises UserError when the file is missing (with the command that fetches
    it), unreachable, or its checksum differs.
    """
    text = str(source)
    is_url = text.startswith(("https://", "http://"))
    name = text.rsplit("/", 1)[-1]
    path = (cache or Path(torch.hub.get_dir()) / "checkpoints") / name if is_url else Path(source)
    if not is_url and path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in (".pth", ".pt", ".safetensors"))
        if len(inside) != 1:
            raise UserError(f"{path} must hold one file of weights (.pth, .pt, .safetensors); it has {len(inside)}")
        path, name = inside[0], inside[0].name
    carried = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    expected = (expected_sha256 or (carried[1] if carried else "")).lower()
    if not path.is_file():
        if not is_url:
            raise UserError(
                f"{path} does not exist; fetch the Inception weights with: curl -L -o '{path}' {WEIGHTS_URL} "
                f"(sha256 {WEIGHTS_SHA256})"
            )
        _fetch(text, path, expected)
    found = file_sha256(path)
    if not found.startswith(expected):
        raise UserError(f"{path} has sha256 {found}, expected {expected}; remove it and fetch it again")
    return path


def _fetch(url: str, path: Path, expected: str) -> None:
    """Download to a file aside, verify, then move into place."""
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, replacing(path) as aside:
            with aside.open("wb") as file:
                while part := reply.read(1 << 20):
                    digest.update(part)
                    file.write(part)
            if not digest.hexdigest().startswith(expected):
                raise UserError(f"{url} delivered sha256 {digest.hexdigest()}, expected {expected}")
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise UserError(f"{url} cannot be fetched: {error}") from None
