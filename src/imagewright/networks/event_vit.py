"""A vision transformer with two class tokens, on frames of events of which patches are left out (arXiv 2301.01928).

Input    patches of `patch` x `patch` pixels, each a token: a convolution; plus fixed sines of column and row. Patches
         that are not kept are removed, not replaced. Two learnt tokens come first: the first looks for what views of
         events share, the second for the picture.
Blocks   x + attention(norm x), then x + MLP(norm x), LayerNorm (1e-6), biases everywhere, GELU; whole branches are
         dropped, the more the later (`drop_path`, of the last block). A last norm.
Answer   both class tokens side by side; the patches' tokens; a linear layer's logits where there are classes.
Weights  Xavier's uniform with biases of zero, only the patches' biases are PyTorch's own; class tokens normal of
         deviation 0.02; the head is PyTorch's own before pre-training, normal (0.01) and zeros in a probe.
Source   Yang et al. 2023, released code: Yan98/Event-Camera-Data-Pre-training (model/ours_model), which decides.
Departs  In fine-tuning positions are what `learn_positions` says; the released network always learns them there. The
         paper's other network, ResNet-50, is not made (the released program has none either).
Checked  parameter counts; an answer of the released network on the same weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.layers import grid_sines
from imagewright.networks.recompute import Block
from imagewright.noise import dropout
from imagewright.types import Encoding

EPS = 1e-6
STD = 0.02
CLASS_TOKENS = 2
Masking = Literal["exact", "published", "uniform"]
EMPTY = -100.0
"""Below the score of any patch with information: ln d + Gumbel noise of float32 is above -92."""


@dataclass(frozen=True, kw_only=True)
class EventViTConfig(NetworkConfig):
    """Arguments of `EventViT`; as they stand those of S/16. Raises UserError on a value outside its range."""

    img_resolution: int
    in_channels: int = 2
    num_classes: int = 0
    """0 = no head."""
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 12
    mlp_ratio: int = 4
    drop_path: float = 0.0
    """Probability that the last block's branches are dropped for a frame; the first block's never are."""
    head_norm: bool = False
    """A norm before the head, as in pre-training."""
    learn_positions: bool = False

    def __post_init__(self) -> None:
        least = {"num_classes": 0}
        for name in ("img_resolution", "in_channels", "num_classes", "patch", "width", "depth", "heads", "mlp_ratio"):
            self.require_whole(name, least.get(name, 1))
        fits = self.img_resolution % self.patch == 0
        require(fits, "patch", self.patch, f"a divisor of img_resolution, {self.img_resolution}")
        require(self.width % 4 == 0, "width", self.width, "divisible by 4 (sines of rows and columns)")
        require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width, {self.width}")
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "in [0, 1)")

    @property
    def side(self) -> int:
        """Patches in a row."""
        return self.img_resolution // self.patch


SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depth": 12, "heads": 12},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
}
"""The published ones, of patches of 16."""


class EventViT(Network):
    """Frames [N, C, S, S] in [-1, 1] -> features, tokens and logits."""

    config_class: ClassVar[type[NetworkConfig]] = EventViTConfig
    positions: Tensor
    """[L, width]."""

    def __init__(self, config: EventViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = nn.Conv2d(config.in_channels, width, config.patch, config.patch)
        nn.init.xavier_uniform_(self.patches.weight.view(width, -1))
        self.tokens = nn.Parameter(STD * torch.randn(1, CLASS_TOKENS, width))
        if config.learn_positions:
            self.positions = nn.Parameter(grid_sines(config.side, width))
        else:
            self.register_buffer("positions", grid_sines(config.side, width))
        drops = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(ViTBlock(width, config.heads, config.mlp_ratio, drop) for drop in drops)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head: nn.ModuleDict | None = None
        if config.num_classes:
            linear = nn.Linear(CLASS_TOKENS * width, config.num_classes)
            norm = nn.LayerNorm(CLASS_TOKENS * width) if config.head_norm else nn.Identity()
            self.head = nn.ModuleDict({"norm": norm, "linear": linear})

    def look(self, frames: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both class tokens [N, 2, width], and those of the patches at `kept`, int64 [N, K]; None = all of them."""
        x = self.patches(frames).flatten(2).mT
        x = x + self.positions.to(x.dtype)
        if kept is not None:
            x = x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([self.tokens.to(x.dtype).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, :CLASS_TOKENS], x[:, CLASS_TOKENS:]

    def named(self, pooled: Tensor) -> Tensor | None:
        """Logits of features [N, 2 width]; None without a head."""
        if self.head is None:
            return None
        logits: Tensor = self.head["linear"](self.head["norm"](pooled))
        return logits

    def forward(self, frames: Tensor) -> Encoding:
        tokens, patches = self.look(frames)
        pooled = tokens.flatten(1)
        return Encoding(pooled, patches, (self.config.side, self.config.side), self.named(pooled))


class ViTBlock(Block):
    """x + attention(norm x), then x + MLP(norm x), [N, L, width]."""

    def __init__(self, width: int, heads: int, mlp_ratio: int, drop: float = 0.0) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm, self.again = nn.LayerNorm(width, eps=EPS), nn.LayerNorm(width, eps=EPS)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))
        for layer in (self.qkv, self.out, self.mlp[0], self.mlp[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self._branch(self.out(seen))
        return x + self._branch(self.mlp(self.again(x)))

    def _branch(self, added: Tensor) -> Tensor:
        """What a branch adds, dropped for a whole frame with a probability."""
        if not self.drop or not self.training:
            return added
        return added * dropout(added.new_ones(len(added), 1, 1), self.drop, self.training)


def patch_information(frames: Tensor, patch: int) -> Tensor:
    """How much there is in each patch of frames in [-1, 1]: the sum of what is above -1, [N, L]."""
    channels = frames.shape[1]
    mean: Tensor = F.avg_pool2d(((frames + 1) / 2).mean(1, keepdim=True), patch).flatten(1)
    return mean * channels * patch**2


def drawn(information: Tensor, count: int, uniform: Tensor, way: Masking) -> Tensor:
    """`count` patches of each row, int64 [N, count], by information d >= 0 [N, L] and uniform numbers U [N, L].

    exact: one after the other, without replacement, by probabilities in proportion to d: the largest of ln d plus
    Gumbel noise. published: the largest of d U, which is another law. uniform: without d. Otherwise patches without
    information come last, in random order.
    """
    if way == "uniform":
        return uniform.topk(count, 1).indices
    share = information / information.amax(1, keepdim=True).clamp_min(torch.finfo(information.dtype).tiny)
    gumbel = -torch.log(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log())
    score = share.log() + gumbel if way == "exact" else share * uniform
    return torch.where(information > 0, score, EMPTY * (1 + uniform)).topk(count, 1).indices


def kept_count(patches: int, share: float) -> int:
    """How many of so many patches are kept: down, as the released program counts, and one at least."""
    return max(1, math.floor(patches * share + 1e-9))
