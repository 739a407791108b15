"""CLIP: a vision transformer of patches and a causal transformer of tokens, in one space (2103.00020, 2507.22062).

Pictures   Patches by a convolution without bias, a class token before them, learned places, a norm; blocks that
           normalise first; the class token, a norm, a projection without bias.
Texts      Tokens, learned places, blocks that see what stands before alone; a norm, and the first place that holds the
           end of the text (id 2), projected without bias.
Blocks     Attention, then two layers with GELU, or with x sigmoid(1.702 x) (`quick_gelu`, the released H/14).
Init       The official program's: of the vision tower torch's own, of the text tower normal numbers of std width^-1/2
           (attention), (2 width)^-1/2, and (2 width depth)^-1/2 for layers that end a branch.
Source     facebookresearch/MetaCLIP, `src/mini_clip/{model,model_worldwide}.py` and its configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.patterns import Dense
from imagewright.networks.residual import ResidualBlock, Style
from imagewright.types import Encoding, UserError

Activation = Literal["exact_gelu", "quick_gelu"]
END = 2
"""The id that ends a text, of which every text has one: XLM-V's, and that of `data.words`."""
SCALE = math.log(1 / 0.07)
"""What the logarithm of the logits' scale begins with."""


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(NetworkConfig):
    """Arguments of `CLIP`; the defaults are ViT-B/16's, worldwide. Raises UserError on a value outside its range."""

    img_resolution: int = 224
    in_channels: int = 3
    patch: int = 16
    """Pixels a side."""
    width: int = 768
    """Of the vision tower."""
    depth: int = 12
    head_width: int = 64
    mlp_ratio: float = 4.0
    embed: int = 512
    """Numbers of an embedding."""
    vocabulary: int = 901_629
    length: int = 77
    """Most tokens of a text."""
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    activation: Activation = "exact_gelu"

    def __post_init__(self) -> None:
        for name in ("img_resolution", "in_channels", "patch", "width", "depth", "head_width", "embed", "text_width",
                     "text_depth", "text_heads"):  # fmt: skip
            self.require_whole(name, 1)
        self.require_whole("vocabulary", 4)
        self.require_whole("length", 2)
        require(
            self.img_resolution % self.patch == 0, "patch", self.patch, f"a divisor of {self.img_resolution} pixels"
        )
        require(
            self.width % self.head_width == 0, "head_width", self.head_width, f"a divisor of the width, {self.width}"
        )
        require(
            self.text_width % self.text_heads == 0, "text_heads", self.text_heads, f"a divisor of {self.text_width}"
        )
        require(self.mlp_ratio * self.width >= 1, "mlp_ratio", self.mlp_ratio, "positive, a hidden unit at least")
        require(
            self.activation in get_args(Activation), "activation", self.activation, " or ".join(get_args(Activation))
        )

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.img_resolution // self.patch


class CLIP(Network):
    """`image` and `text` make embeddings, not normalised; `log_scale` is the logarithm of the logits' scale, []."""

    config_class: ClassVar[type[CLIPConfig]] = CLIPConfig
    config: CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = c = config
        scale = c.width**-0.5
        self.patches = nn.Conv2d(c.in_channels, c.width, c.patch, c.patch, bias=False)
        self.first = nn.Parameter(scale * torch.randn(c.width))
        self.places = nn.Parameter(scale * torch.randn(c.side**2 + 1, c.width))
        self.before, self.after = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        seeing = Style(
            width=c.width, heads=c.width // c.head_width, hidden=int(c.width * c.mlp_ratio), activation=c.activation
        )
        self.blocks = nn.ModuleList(ResidualBlock(seeing, Dense(causal=False)) for _ in range(c.depth))
        self.project = nn.Parameter(scale * torch.randn(c.width, c.embed))
        self.tokens = nn.Embedding(c.vocabulary, c.text_width)
        self.text_places = nn.Parameter(torch.empty(c.length, c.text_width))
        reading = Style(width=c.text_width, heads=c.text_heads, hidden=4 * c.text_width, activation=c.activation)
        self.text_blocks = nn.ModuleList(ResidualBlock(reading, Dense(causal=True)) for _ in range(c.text_depth))
        self.text_after = nn.LayerNorm(c.text_width)
        self.text_project = nn.Parameter(torch.empty(c.text_width, c.embed))
        self.log_scale = nn.Parameter(torch.tensor(SCALE))
        self._initialise()

    def _initialise(self) -> None:
        width, depth = self.config.text_width, self.config.text_depth
        block: Any
        for block in (*self.blocks, *self.text_blocks):
            nn.init.xavier_uniform_(block.qkv.weight)
            nn.init.zeros_(block.qkv.bias)
            nn.init.zeros_(block.out.bias)
        for block in self.text_blocks:
            nn.init.normal_(block.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.up.weight, std=(2 * width) ** -0.5)
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=(2 * width * depth) ** -0.5)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.text_places, std=0.01)
        nn.init.normal_(self.text_project, std=width**-0.5)

    def image(self, images: Tensor) -> Encoding:
        """Normalised pictures [N, C, H, H] -> their embeddings [N, embed], and the last block's patches as tokens."""
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.first.to(x.dtype).expand(len(x), 1, -1), x], 1)
        x = self.before(x + self.places)
        for block in self.blocks:
            x = block(x)
        side = self.config.side
        return Encoding(self.after(x[:, 0]) @ self.project, x[:, 1:], (side, side))

    def text(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 [N, L], L at most `length` -> embeddings [N, embed]. Raises UserError for longer texts."""
        count = tokens.shape[1]
        if count > self.config.length:
            raise UserError(f"a text has {count} tokens; this network takes at most {self.config.length}")
        x = self.tokens(tokens) + self.text_places[:count]
        for block in self.text_blocks:
            x = block(x)
        end = (tokens == END).int().argmax(1)
        return self.text_after(x[torch.arange(len(x), device=x.device), end]) @ self.text_project  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Encoding:
        """As `image`."""
        return self.image(images)


def _size(patch: int, width: int, depth: int, embed: int, text: tuple[int, int, int], **more: Any) -> dict[str, Any]:
    wide, deep, heads = text
    told = {"patch": patch, "width": width, "depth": depth, "embed": embed}
    return {**told, "text_width": wide, "text_depth": deep, "text_heads": heads, **more}


SIZES: Mapping[str, Mapping[str, Any]] = {
    "S/16": _size(16, 384, 12, 384, (384, 12, 6)),
    "M/16": _size(16, 512, 12, 512, (512, 12, 8)),
    "B/32": _size(32, 768, 12, 512, (512, 12, 8)),
    "B/16": _size(16, 768, 12, 512, (512, 12, 8)),
    "L/14": _size(14, 1024, 24, 768, (768, 12, 12)),
    "H/14": _size(14, 1280, 32, 1024, (1024, 24, 16), head_width=80, activation="quick_gelu"),
    "bigG/14": _size(14, 1664, 48, 1280, (1280, 32, 20), head_width=104, mlp_ratio=4.9231),
}
"""The worldwide configurations, of which H/14 is the one with `quick_gelu` in its name."""
