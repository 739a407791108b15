"""A diffusion transformer on patches: DiT, with the parts by which LightningDiT made it modern.

Input      patches of `patch` x `patch` pixels, each a token: a linear layer, plus a fixed table of sines of column and
           row.
Condition  256 cosines and sines of the noise label, two layers with SiLU between, plus a vector of the class, with one
           more for no class. SiLU and a layer of each block's own, zeros at the start, make of it what scales and
           shifts the normalised tokens before both branches, and gates what these add (adaLN-zero).
Blocks     attention, queries and keys turned by row and column (`rotary`), perhaps normalised before (`qk_norm`: where
           the loss becomes NaN); then SwiGLU with biases. RMSNorm with weights of its own in front of both, or
           LayerNorm without.
Output     a norm that is scaled and shifted alike, a layer of zeros: the answer is zero at the start.
Weights    Xavier's uniform with biases of zero; vectors of classes and the label's two layers normal of deviation 0.02.
Source     Yao et al. 2025 (LightningDiT, arXiv 2501.01423), released program, whose XL/1 the defaults are; Peebles and
           Xie 2023 (DiT, 2212.09748), which is norm "layer", without `rotary` and `gated`.
Departs    Without classes there is no vector of a class, where the released network would have one for none; with them
           there always is one for none, which the released one leaves out where labels are never hidden. Dropout (none
           is published), the augmentation vector, a destination and a strength of guidance are this library's; the last
           two are plain layers whose answer, zero at first, is added to the condition. Tables are buffers, no weights
           that do not learn. No second half of channels for a variance.
Checked    answers and the number of parameters are the released program's (tests/parity/test_lightningdit.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import NetworkConfig, require
from imagewright.networks.gated import SwiGLU
from imagewright.networks.image_network import ImageNetwork, destination_of, weight_of
from imagewright.networks.layers import Init, PositionalEmbedding, ToldNumber, class_index, grid_sines, linear
from imagewright.networks.recompute import Block
from imagewright.networks.rotary import grid, turned, turns
from imagewright.networks.tangents import attention
from imagewright.noise import dropout, kept
from imagewright.types import UNCONDITIONAL, Condition

WAVES = 256
"""Cosines and sines of the noise label."""
EPS = 1e-6
USUAL = Init("xavier_uniform")
ZERO = Init("xavier_uniform", weight=0)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(NetworkConfig):
    """Arguments of `DiT`; the defaults are LightningDiT-XL/1's. Raises UserError on a value outside its range."""

    img_resolution: int
    """Height and width of the images, or latents; a multiple of `patch`."""
    in_channels: int
    out_channels: int
    label_dim: int = 0
    """Number of classes; 0 = labels are ignored."""
    augment_dim: int = 0
    """Length of the augmentation vector; 0 = it is ignored."""
    patch: int = 1
    """Side of a patch, in pixels."""
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    """Hidden width of the second branch, in units of `width`; with `gated`, two thirds of it."""
    gated: bool = True
    """SwiGLU; otherwise two layers with GELU (tanh form) between."""
    norm: Literal["rms", "layer"] = "rms"
    rotary: bool = True
    """Turn queries and keys by row and column."""
    qk_norm: bool = False
    """Normalise queries and keys: more stable, learns a little slower."""
    shift: bool = True
    """Whether blocks are told a shift, beside scale and gate."""
    dropout: float = 0.0
    """On what each branch adds."""
    label_dropout: float = 0.1
    """Probability of hiding an image's class in training, for classifier-free guidance."""
    destination: bool = False
    """Also told the noise level to go to (`Condition.destination`), as the network of a trajectory model is."""
    weight: bool = False
    """Also told the strength of guidance (`Condition.weight`), as guided students are."""

    def __post_init__(self) -> None:
        least = {"img_resolution": 1, "in_channels": 1, "out_channels": 1, "label_dim": 0, "augment_dim": 0, "patch": 1,
                 "width": 1, "depth": 1, "heads": 1}  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            require(whole, name, value, f"an integer >= {low}")
        require(self.img_resolution % self.patch == 0, "patch", self.patch,
                f"a divisor of img_resolution, {self.img_resolution}")  # fmt: skip
        require(self.width % 4 == 0, "width", self.width, "divisible by 4 (sines of rows and columns)")
        require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width, {self.width}")
        if self.rotary:
            fits = self.width // self.heads % 4 == 0
            require(fits, "heads", self.heads, f"such that a head has a multiple of 4 of the {self.width} channels")
        require(self.norm in ("rms", "layer"), "norm", self.norm, "rms or layer")
        require(0 < self.mlp_ratio < 1000 and self.hidden >= 1, "mlp_ratio", self.mlp_ratio,
                "positive, a hidden unit at least")  # fmt: skip
        for name in ("dropout", "label_dropout"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")

    @property
    def hidden(self) -> int:
        """Hidden width of the second branch; rounded as in the released program."""
        plain = int(self.mlp_ratio * self.width)
        return int(2 / 3 * plain) if self.gated else plain

    @property
    def side(self) -> int:
        """Patches in a row."""
        return self.img_resolution // self.patch


class DiT(ImageNetwork):
    """LightningDiT, or DiT. See `ImageNetwork` for shapes."""

    config_class: ClassVar[type[DiTConfig]] = DiTConfig
    config: DiTConfig
    positions: Tensor
    """[L, width]."""
    turns: Tensor | None
    """[L, width, 2], as of `rotary.turned`: of queries, then keys, of all heads."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.width, config.patch**2
        self.into = linear(config.in_channels * pixels, width, USUAL)
        self.waves = PositionalEmbedding(WAVES)
        self.time = nn.Sequential(linear(WAVES, width, USUAL), nn.SiLU(), linear(width, width, USUAL))
        for layer in self.time_layers():
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        self.classes = nn.Embedding(config.label_dim + 1, width) if config.label_dim else None
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=0.02)
        self.augment = linear(config.augment_dim, width, ZERO, bias=False) if config.augment_dim else None
        self.told_to = ToldNumber(WAVES, width, USUAL) if config.destination else None
        self.told_strength = ToldNumber(WAVES, width, USUAL) if config.weight else None
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm = _norm(config)
        self.affine = linear(width, 2 * width, ZERO)
        self.out = linear(width, config.out_channels * pixels, ZERO)
        self.register_buffer("positions", grid_sines(config.side, width), persistent=False)
        found = turns(grid(config.side, config.side), width // config.heads) if config.rotary else None
        # Of all queries and keys, though alike: one pass over a token's numbers as they lie, a fifth of the time.
        self.register_buffer("turns", None if found is None else found.repeat(1, 2 * config.heads, 1), persistent=False)

    def forward(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        told = F.silu(self.embed(noise_label, cond))
        h = self._through(self.blocks, x, told)
        shift, scale = self.affine(told)[:, None].chunk(2, dim=2)
        h = self.out(modulated(self.norm, h, scale, shift))
        maps = self._as_maps(h)
        return maps if self.config.patch == 1 else F.pixel_shuffle(maps, self.config.patch)

    def embed(self, noise_label: Tensor, cond: Condition) -> Tensor:
        emb: Tensor = self.time(self.waves(noise_label).to(self.into.weight.dtype))
        if self.augment is not None and cond.augment is not None:
            emb = emb + self.augment(cond.augment.to(emb.dtype))
        if self.classes is not None:
            emb = emb + self.classes(self._class_rows(cond, emb))
        if self.told_to is not None:
            emb = emb + self.told_to(destination_of(cond))
        if self.told_strength is not None:
            emb = emb + self.told_strength(weight_of(cond))
        return emb

    def bottleneck(self, x: Tensor, noise_label: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """The tokens after the first half of the blocks, where they stand: [N, width, side, side]."""
        first = self.blocks[: (self.config.depth + 1) // 2]
        return self._as_maps(self._through(first, x, F.silu(self.embed(noise_label, cond))))

    def time_layers(self) -> list[nn.Module]:
        return [layer for layer in self.time if isinstance(layer, nn.Linear)]

    @property
    def last_layer(self) -> nn.Parameter:
        return cast(nn.Parameter, self.out.weight)

    def _through(self, blocks: nn.ModuleList, x: Tensor, told: Tensor) -> Tensor:
        """Tokens [N, L, width] of images x after some blocks."""
        patches = x if self.config.patch == 1 else F.pixel_unshuffle(x, self.config.patch)
        h = self.into(patches.flatten(2).transpose(1, 2)) + self.positions
        for block in blocks:
            h = block(h, told, self.turns)
        return cast(Tensor, h)

    def _as_maps(self, h: Tensor) -> Tensor:
        """[N, L, D] -> [N, D, side, side]."""
        side = self.config.side
        return h.transpose(1, 2).reshape(len(h), -1, side, side)

    def _class_rows(self, cond: Condition, like: Tensor) -> Tensor:
        """Row of the table of classes for each image, int64 [N]; the last one where dropout hides the label."""
        none = self.config.label_dim
        rows = class_index(cond, none, len(like), like.device)
        if self.training and self.config.label_dropout:
            rows = torch.where(kept(like[:, :1], self.config.label_dropout)[:, 0], rows, none)
        return rows


class DiTBlock(Block):
    """Attention, then two layers, gated or not; the condition scales, shifts and gates both."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, head = config.width, config.width // config.heads
        self.affine = linear(width, (6 if config.shift else 4) * width, ZERO)
        self.norm0, self.norm1 = _norm(config), _norm(config)
        self.qkv, self.proj = linear(width, 3 * width, USUAL), linear(width, width, USUAL)
        self.qk_norms = nn.ModuleList(_head_norm(config, head) for _ in "qk") if config.qk_norm else None
        if config.gated:
            self.mlp: nn.Module = SwiGLU(width, config.hidden, bias=True)
            USUAL.fill(self.mlp.gate_up)
            USUAL.fill(self.mlp.down)
        else:
            grow, shrink = linear(width, config.hidden, USUAL), linear(config.hidden, width, USUAL)
            self.mlp = nn.Sequential(grow, nn.GELU(approximate="tanh"), shrink)

    def forward(self, h: Tensor, told: Tensor, turns: Tensor | None) -> Tensor:
        """h: [N, L, width]; told: [N, width], after SiLU; turns: [L, width, 2] or None."""
        parts = self.affine(told)[:, None].chunk(6 if self.config.shift else 4, dim=2)
        shift0, scale0, gate0, shift1, scale1, gate1 = (
            parts if self.config.shift else (None, *parts[:2], None, *parts[2:])
        )
        h = self._added(h, gate0, self._attended(modulated(self.norm0, h, scale0, shift0), turns))
        return self._added(h, gate1, self.mlp(modulated(self.norm1, h, scale1, shift1)))

    def _added(self, h: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(h, gate, dropout(branch, self.config.dropout, self.training))

    def _attended(self, h: Tensor, turns: Tensor | None) -> Tensor:
        n, length, width = h.shape
        both, values = self.qkv(h).split((2 * width, width), 2)  # queries and keys, heads side by side
        if self.qk_norms is not None:
            heads = both.view(n, length, 2, self.config.heads, -1).unbind(2)
            both = torch.stack([norm(each) for norm, each in zip(self.qk_norms, heads, strict=True)], 2).flatten(2)
        if turns is not None:
            both = turned(both, turns)
        query, key, value = (
            each.view(n, length, self.config.heads, -1).transpose(1, 2) for each in (*both.chunk(2, 2), values)
        )
        attended: Tensor = self.proj(attention(query, key, value).transpose(1, 2).flatten(2))
        return attended


def modulated(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """norm(x) * (1 + scale) + shift for x [N, L, D], scale and shift [N, 1, D]; in as few passes as PyTorch can.

    Its own RMSNorm takes five passes over memory on a CPU, three more than it needs.
    """
    if isinstance(norm, nn.RMSNorm):
        assert norm.weight is not None and norm.eps is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        x = (x * torch.rsqrt(length.square() / x.shape[-1] + norm.eps)).to(x.dtype)
        factor = norm.weight * (1 + scale)
    else:
        x, factor = norm(x), 1 + scale
    return x * factor if shift is None else torch.addcmul(shift, x, factor)


def _norm(config: DiTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=EPS)
    return nn.LayerNorm(config.width, eps=EPS, elementwise_affine=False)


def _head_norm(config: DiTConfig, channels: int) -> nn.Module:
    """Of one head's queries or keys."""
    return nn.RMSNorm(channels, eps=EPS) if config.norm == "rms" else nn.LayerNorm(channels)
