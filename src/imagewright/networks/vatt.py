"""VATT: transformers over raw video, sound and words, one for each or one for all (Akbari et al. 2021, 2104.11178).

Tokens     video: patches of 4 frames and 16x16 pixels; sound: pieces of 128 samples; each through one linear layer.
           words: a table of vectors of 300. A learnt vector more stands for the whole; what comes of it is pooled.
Places     video: three tables (frames, rows, columns), added; sound: one. Normalised, then added, then dropout. Words
           with a backbone of their own have none: attention has a bias, learnt for 32 distances.
Layers     h + f(LN h), f attention, then h + f(LN h), f two layers with GELU between; a norm at the end. Of words with
           a backbone of their own as T5's: dense layers without biases, scores that are not divided by the root of the
           heads' width, and root mean squares in place of layer norms, but for that before the two dense layers.
Shared     one backbone for all; of each signal are its tokens, a dense layer with GELU before, places (words have a
           table, too) and the vector for all, and a dense layer with GELU after.
Joined     video against sound: dense, batch norm, ReLU, dense, batch norm; sound: dense. Video against words is made of
           *video against sound*: ReLU, dense, batch norm; words: dense. Dense layers before a batch norm have no bias.
Dropped    `keep`: only those tokens of video or sound are seen, after places were added; in training alone.
Source     The released code: google-research/google-research, folder vatt (modeling/backbones, heads/bridge.py,
           common/transformers.py, configs), which decides. The paper has batch norms after sound's and words' last
           layers, too, and the bias of attention in the first layer alone, where the code adds the first one's in all.
Departs    The words' table is learnt from the start (there word2vec, and fixed). The variance that batch norms keep for
           evaluation is divided by n - 1 (there n). Masking of tokens by a learnt vector (off there) is not made.
Checked    Parameter counts by the code's formulas; numbers of the released code on the same weights; a still picture
           four times is one convolution; masked words and dropped tokens have no influence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.layers import CUT_STD
from imagewright.networks.recompute import Block
from imagewright.noise import dropout
from imagewright.types import UserError

EPS, NORM_EPS, NORM_MOMENTUM = 1e-6, 1e-5, 0.1
"""Of the layers' norms, and of the batch norms; the share of a batch in what these keep."""
EXPANSION = 4
BUCKETS, FARTHEST = 32, 64
"""Of the bias of attention: distances told apart, and that from which on all are one."""
PAD = 1
"""The token that is none: `data.words` has it so."""
Size = tuple[int, ...]
SMALL, BASE, MEDIUM, LARGE = (512, 6, 8), (768, 12, 12), (1024, 12, 16), (1024, 24, 16)
"""Width, layers, heads."""


@dataclass(frozen=True, kw_only=True)
class VATTConfig(NetworkConfig):
    """Arguments of `VATT`; as they stand those of Medium-Base-Small. Raises UserError on a value outside its range."""

    img_resolution: int = 224
    in_channels: int = 3
    frames: int = 32
    patch: tuple[int, ...] = (4, 16)
    """Frames, and pixels of a side."""
    samples: int = 153_600
    """Of the sound that goes with the frames."""
    piece: int = 128
    """Samples of one token."""
    words: int = 65_536
    """Entries of the vocabulary."""
    length: int = 16
    """Words of a caption."""
    word_width: int = 300
    video: Size = MEDIUM
    """Width, layers and heads."""
    audio: Size = BASE
    text: Size = SMALL
    shared: bool = False
    """One backbone for all three, whose sizes must then be alike."""
    after: int = 1024
    """Width of the dense layer after a shared backbone."""
    joint: tuple[int, ...] = (512, 256)
    """Widths of the space of video and sound, and of that of video and words."""
    dropout: float = 0.1
    """On places, on what each branch adds, within it, on attention's weights, and at the end."""

    def __post_init__(self) -> None:
        for name in ("patch", "video", "audio", "text", "joint"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("img_resolution", "in_channels", "frames", "samples", "piece", "words", "length", "word_width"):
            self.require_whole(name, 1)
        self.require_whole("after", 1)
        for name, count in (("patch", 2), ("joint", 2), ("video", 3), ("audio", 3), ("text", 3)):
            value = getattr(self, name)
            fits = len(value) == count and all(isinstance(v, int) and v >= 1 for v in value)
            require(fits, name, value, f"{count} positive integers")
        for name in ("video", "audio", "text"):
            width, _, heads = getattr(self, name)
            require(width % heads == 0, name, getattr(self, name), "a width that the heads share equally, and so on")
        require(self.frames % self.patch[0] == 0, "frames", self.frames, f"a multiple of {self.patch[0]}")
        require(self.img_resolution % self.patch[1] == 0, "img_resolution", self.img_resolution,
                f"a multiple of {self.patch[1]}")  # fmt: skip
        require(self.samples % self.piece == 0, "samples", self.samples, f"a multiple of {self.piece}")
        alike = self.video == self.audio == self.text
        require(not self.shared or alike, "shared", self.shared, "false where video, audio and text are of other sizes")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of a video: in time, down, right."""
        side = self.img_resolution // self.patch[1]
        return self.frames // self.patch[0], side, side

    @property
    def tokens(self) -> dict[str, int]:
        """How many a video and a sound have, besides the one that stands for all."""
        return {"video": math.prod(self.grid), "audio": self.samples // self.piece}


SETS: dict[str, dict[str, Any]] = {
    "BBS": {"video": BASE, "audio": BASE, "text": SMALL},
    "MBS": {"video": MEDIUM, "audio": BASE, "text": SMALL},
    "LBS": {"video": LARGE, "audio": BASE, "text": SMALL},
    "MA": {"video": MEDIUM, "audio": MEDIUM, "text": MEDIUM, "shared": True},
}
"""The published ones: a backbone for each signal, or (modality-agnostic) one for all."""


class Joint(NamedTuple):
    """Vectors in the common spaces, [N, ...] each: not normalised. text: of captions, [K N, ...]."""

    video_to_audio: Tensor
    audio: Tensor
    video_to_text: Tensor
    text: Tensor


class Layer(Block):
    """h + attention(norm h), then h + MLP(norm h). like_t5: dense without biases, the first norm RMS, scores as is."""

    def __init__(self, width: int, heads: int, dropped: float, *, like_t5: bool) -> None:
        super().__init__()
        self.heads, self.dropped, self.scale = heads, dropped, 1.0 if like_t5 else None
        dense = partial(nn.Linear, bias=not like_t5)
        self.norm0, self.norm1 = (nn.RMSNorm if like_t5 else nn.LayerNorm)(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv, self.out = dense(width, 3 * width), dense(width, width)
        self.up, self.down = dense(width, EXPANSION * width), dense(EXPANSION * width, width)
        _glorot(self.qkv, parts=3)
        for layer in (self.out, self.up, self.down):
            _glorot(layer)

    def forward(self, h: Tensor, bias: Tensor | None = None) -> Tensor:
        """h: [N, T, width]; bias: of the scores, or where to look (bool), broadcast to [N, heads, T, T]."""
        q, k, v = rearrange(self.qkv(self.norm0(h)), "n t (s h c) -> s n h t c", s=3, h=self.heads).unbind()
        bias = bias.to(q.dtype) if bias is not None and bias.is_floating_point() else bias
        share = self.dropped if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=share, scale=self.scale)
        h = h + self._drop(self.out(rearrange(attended, "n h t c -> n t (h c)")))
        return h + self._drop(self.down(self._drop(F.gelu(self.up(self.norm1(h))))))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropped, self.training)


class Backbone(nn.Module):
    """Layers and a norm: [N, T, width] -> the same. like_t5: as `Layer`, with a bias for distances."""

    def __init__(self, size: Size, dropped: float, *, like_t5: bool = False) -> None:
        super().__init__()
        width, depth, heads = size
        self.dropped = dropped
        self.distances = nn.Embedding(BUCKETS, heads) if like_t5 else None
        if self.distances is not None:
            nn.init.uniform_(self.distances.weight, -0.05, 0.05)
        self.layers = nn.ModuleList(Layer(width, heads, dropped, like_t5=like_t5) for _ in range(depth))
        self.norm = (nn.RMSNorm if like_t5 else nn.LayerNorm)(width, eps=EPS)

    def forward(self, h: Tensor, present: Tensor | None = None) -> Tensor:
        """present: [N, T], which tokens may be looked at; None = all."""
        seen = None if present is None else present[:, None, None, :]
        if self.distances is not None:
            h = dropout(h, self.dropped, self.training)
            bias = self.distances(buckets(h.shape[1], h.device)).permute(2, 0, 1)[None]
            seen = bias if seen is None else torch.where(seen, bias, -1e9)
        for layer in self.layers:
            h = layer(h, seen)
        return dropout(self.norm(h), self.dropped, self.training)


class Places(nn.Module):
    """Tokens [N, T, width] with their places added: one table for each axis of their grid."""

    def __init__(self, counts: Sequence[int], width: int, dropped: float) -> None:
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(count, width)) for count in counts)
        for table in self.tables:
            _truncated(table, width**-0.5)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.dropped = dropped

    def forward(self, h: Tensor, grid: Sequence[int]) -> Tensor:
        """grid: tokens along each axis, in raster order. Other numbers than the tables' are interpolated."""
        place = torch.zeros((), device=h.device)
        for table, count in zip(self.tables, grid, strict=True):
            place = place[..., None, :] + stretched(table, count) if place.ndim else stretched(table, count)
        return dropout(h + self.norm(place.flatten(0, -2)), self.dropped, self.training)


class Tower(nn.Module):
    """One signal: its tokens, their places, and the vector that stands for all; before and after a shared backbone."""

    def __init__(self, entry: nn.Linear | nn.Embedding, counts: Sequence[int], width: int, config: VATTConfig) -> None:
        super().__init__()
        self.entry = entry
        of = entry.embedding_dim if isinstance(entry, nn.Embedding) else width
        self.before, self.after = None, None
        if config.shared:
            self.before, self.after = nn.Linear(of, width), nn.Linear(width, config.after)
        elif isinstance(entry, nn.Embedding):
            self.before = nn.Linear(of, width, bias=False)
        for layer in (self.before, self.after):
            if layer is not None:
                _glorot(layer)
        # Words with a backbone of their own have no places, and their vector for all goes through the dense layer.
        placed = config.shared or not isinstance(entry, nn.Embedding)
        self.places = Places(counts, width, config.dropout) if placed else None
        self.whole = nn.Parameter(torch.empty(width if placed else of))
        _truncated(self.whole, self.whole.numel() ** -0.5 / CUT_STD)

    def tokens(self, shown: Tensor, grid: Sequence[int], keep: Tensor | None = None) -> Tensor:
        """What a backbone is given, [N, 1 + T, width]: first the token for all. keep: which others, int64 [k]."""
        h = self.entry(shown)
        if self.places is None:
            h = torch.cat([self.whole.expand(len(h), 1, -1), h], 1)
            return F.gelu(self.before(h)) if self.before is not None else h
        if self.before is not None:
            h = F.gelu(self.before(h))
        h = self.places(h, grid)
        if keep is not None and self.training:
            h = h[:, keep]
        return torch.cat([self.whole.expand(len(h), 1, -1).to(h.dtype), h], 1)

    def finished(self, h: Tensor) -> Tensor:
        """What the backbone made, through the layer after it."""
        return h if self.after is None else F.gelu(self.after(h))


class Bridge(nn.Module):
    """From pooled vectors to the common spaces."""

    def __init__(self, widths: Sequence[int], joint: Sequence[int]) -> None:
        super().__init__()
        (video, audio, text), (fine, coarse) = widths, joint
        norm = partial(nn.BatchNorm1d, eps=NORM_EPS, momentum=NORM_MOMENTUM)
        self.video0, self.norm0 = nn.Linear(video, fine, bias=False), norm(fine)
        self.video1, self.norm1 = nn.Linear(fine, fine, bias=False), norm(fine)
        self.video2, self.norm2 = nn.Linear(fine, coarse, bias=False), norm(coarse)
        self.audio, self.text = nn.Linear(audio, fine), nn.Linear(text, coarse)
        for layer in (self.video0, self.video1, self.video2, self.audio, self.text):
            _glorot(layer)

    def forward(self, video: Tensor, audio: Tensor, text: Tensor) -> Joint:
        fine = self.norm1(self.video1(F.relu(self.norm0(self.video0(video)))))
        return Joint(fine, self.audio(audio), self.norm2(self.video2(F.relu(fine))), self.text(text))


class VATT(Network):
    """Video [N, C, F, H, W], sound [N, samples] and captions [N, length] -> one vector for each."""

    config_class: ClassVar[type[NetworkConfig]] = VATTConfig

    def __init__(self, config: VATTConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = {"video": c.video[0], "audio": c.audio[0], "text": c.text[0]}
        time, side = c.patch
        entries: dict[str, nn.Linear | nn.Embedding] = {
            "video": _convolved(nn.Linear(c.in_channels * time * side**2, widths["video"]), time * side**2),
            "audio": _convolved(nn.Linear(c.piece, widths["audio"]), c.piece),
            "text": nn.Embedding(c.words, c.word_width),
        }
        nn.init.uniform_(entries["text"].weight, -0.05, 0.05)
        counts = {"video": c.grid, "audio": (c.tokens["audio"],), "text": (c.length,)}
        self.towers = nn.ModuleDict({name: Tower(entries[name], counts[name], widths[name], c) for name in entries})
        self.backbones = nn.ModuleDict(
            {"all": Backbone(c.video, c.dropout)}
            if c.shared
            else {name: Backbone(getattr(c, name), c.dropout, like_t5=name == "text") for name in entries}
        )
        pooled = [c.after] * 3 if c.shared else list(widths.values())
        self.bridge = Bridge(pooled, c.joint)

    def forward(self, video: Tensor, audio: Tensor, words: Tensor) -> Joint:
        """Of a whole batch, with a caption for each clip."""
        return self.joined(*self.training_pass(video, audio, words))

    def training_pass(self, video: Tensor, audio: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The pooled vectors: what a step computes of each example by itself."""
        return self.video(video)[:, 0], self.audio(audio)[:, 0], self.text(words)[:, 0]

    def video(self, video: Tensor, keep: Tensor | None = None) -> Tensor:
        """[N, C, F, H, W] -> [N, 1 + tokens, width], first the pooled one. keep: int64 [k], in training alone."""
        time, side = self.config.patch
        for what, have, step in zip(("frames", "rows", "columns"), video.shape[2:], (time, side, side), strict=True):
            if have % step:
                raise UserError(f"a video has {have} {what}; this network takes multiples of {step}")
        shown = rearrange(video, "n c (f a) (h b) (w d) -> n f h w (c a b d)", a=time, b=side, d=side)
        return self._through("video", shown.flatten(1, 3), shown.shape[1:4], keep)

    def audio(self, audio: Tensor, keep: Tensor | None = None) -> Tensor:
        """[N, samples] -> [N, 1 + tokens, width], as `video`."""
        if audio.shape[1] % self.config.piece:
            raise UserError(
                f"a sound has {audio.shape[1]} samples; this network takes multiples of {self.config.piece}"
            )
        shown = audio.reshape(len(audio), -1, self.config.piece)
        return self._through("audio", shown, shown.shape[1:2], keep)

    def text(self, words: Tensor) -> Tensor:
        """int64 [N, length], padded -> [N, 1 + length, width], first the pooled one."""
        present = F.pad(words != PAD, (1, 0), value=True)
        return self._through("text", words, words.shape[1:2], None, present)

    def joined(self, video: Tensor, audio: Tensor, text: Tensor) -> Joint:
        """Pooled vectors, [N, width] (of captions [K N, width]), of a whole batch, in the common spaces."""
        joint: Joint = self.bridge(video, audio, text)
        return joint

    def _through(
        self, name: str, shown: Tensor, grid: Sequence[int], keep: Tensor | None, present: Tensor | None = None
    ) -> Tensor:
        tower, backbone = self.towers[name], self.backbones["all" if self.config.shared else name]
        assert isinstance(tower, Tower)
        return tower.finished(backbone(tower.tokens(shown, grid, keep), present))


def buckets(length: int, device: torch.device) -> Tensor:
    """T5's number of each distance between places, int64 [length, length]: half of them for what follows."""
    place = torch.arange(length, device=device)
    ahead = place[None, :] - place[:, None]
    half, exact = BUCKETS // 2, BUCKETS // 4
    far = ahead.abs()
    logs = (far.clamp_min(1).float() / exact).log() / math.log(FARTHEST / exact) * (half - exact)
    large = (exact + logs.long()).clamp_max(half - 1)
    return (ahead > 0) * half + torch.where(far < exact, far, large)


def stretched(table: Tensor, count: int) -> Tensor:
    """Rows [n, width] of places 0, 1/n, ... at 0, 1/count, ...: by the natural cubic spline, which is linear beyond."""
    n = len(table)
    if count == n:
        return table
    if n == 1:
        return table.expand(count, -1)
    knots, wanted = (torch.arange(k, dtype=torch.float32, device=table.device) / k for k in (n, count))

    def rows(at: Tensor) -> Tensor:  # |x|^3 around every knot, and a straight line
        return torch.cat([(at[:, None] - knots).abs() ** 3, torch.ones_like(at)[:, None], at[:, None]], 1)

    line = rows(knots)[:, n:]
    system = torch.cat([rows(knots), F.pad(line.T, (0, 2))])
    weights: Tensor = torch.linalg.solve(system, F.pad(table.float(), (0, 0, 0, 2)))
    return rows(wanted) @ weights


def _glorot(layer: nn.Linear, parts: int = 1) -> None:
    """Keras's initialisation of a dense layer, or of several that are computed as one; biases of zero."""
    for part in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(part)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _convolved(layer: nn.Linear, places: int) -> nn.Linear:
    """Initialised as Keras does a convolution over so many places, whose outputs count once for each."""
    bound = math.sqrt(6 / (layer.in_features + layer.out_features * places))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def _truncated(weight: Tensor, std: float) -> None:
    """Normal, cut at two deviations."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
