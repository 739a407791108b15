"""VCMamba, an image encoder and classifier (Munir, Zhang & Marculescu 2025, arXiv 2509.04669).

Stages   a stem of two 3x3 convolutions (stride 4); stages of convolution blocks with a 3x3 convolution of stride 2
         between them; the last `mamba` blocks of the last stage scan the grid.
Blocks   x + scale MLP(x), the scale learnt for each channel from 1e-5; MLP: 1x1 to four times the width, norm, GELU,
         depthwise 3x3, norm, GELU, 1x1, norm. A scanning block: x + SSM(norm x), then x + MLP(norm x) without a scale.
         All norms are of the batch. Whole branches are dropped, the more the later (`drop_path`, of the last block).
SSM      1x1 to twice the width, norm, depthwise 7x7, SiLU; steps, B and C from a linear map of each cell; four
         selective scans, summed; layer norm, ReLU, 1x1, norm. No gate.
Scans    snakes by rows and by columns from the top left, and their reversals: consecutive cells are neighbours. B is
         told, by a learnt vector, by which move the cell was entered (start, right, left, up, down).
Head     layer norm of every cell, mean, a linear layer; and a second one that is taught by distillation. Both answer in
         training, their mean otherwise.
Source   The released code: Wertyuui345/VCMamba (model/mambacnn.py, model/plain_mamba_layer.py), which decides.
Released Its weights depend on two quirks that `official_compat` keeps: only the cells' contents are brought into the
         scan's order, steps, B and C stay in raster order in all four; and the steps' bias is added twice. There, too,
         the initialisation of steps between 0.001 and 0.1 is overwritten, and they begin at softplus(0) = 0.69.
Departs  Without `official_compat` steps, B and C go along, the bias is added once, and steps begin as in Mamba. The
         stem may have a stride of 2 or 1, for small images: at 64 pixels one of 4 would leave a grid of 2x2. Truncated
         normal weights are cut at two deviations (there at 2, which is never). The backbone of segmentation, without
         the head, is not made.
Checked  parameter counts; an answer of the released program on the same weights; orders; the scan against its
         recurrence in float64, with gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.config import Network, NetworkConfig, require
from imagewright.networks.selective_scan import selective_scan
from imagewright.noise import dropout
from imagewright.precision import uncast
from imagewright.types import Encoding

EXPANSION = 4
"""Of the MLPs."""
INNER = 2
"""Of the SSM."""
STATE = 16
SCANS = 4
MOVES = 5
"""Start, right, left, up, down."""
STD = 0.02
SCALE = 1e-5
STEPS = (1e-3, 1e-1)


@dataclass(frozen=True, kw_only=True)
class VCMambaConfig(NetworkConfig):
    """Arguments of `VCMamba`; as they stand those of VCMamba-B. Raises UserError on a value outside its range."""

    img_resolution: int
    in_channels: int = 3
    num_classes: int = 1000
    widths: tuple[int, ...] = (64, 128, 320, 512)
    """Of the stages."""
    depths: tuple[int, ...] = (4, 4, 12, 6)
    """Blocks of the stages."""
    mamba: int = 4
    """Blocks at the end of the last stage that scan."""
    stem: int = 4
    """Stride of the stem: 4, 2 or 1."""
    drop_path: float = 0.0
    """Probability that the last block's branches are dropped for an image; the first block's never are."""
    official_compat: bool = False
    """The quirks of the released program, for its weights."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "depths", tuple(self.depths))
        for name in ("img_resolution", "in_channels", "num_classes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        require(len(self.widths) >= 1 and all(w >= 2 for w in self.widths), "widths", self.widths, "of at least 2")
        fits = len(self.depths) == len(self.widths) and all(d >= 1 for d in self.depths)
        require(fits, "depths", self.depths, f"a positive integer for each of the {len(self.widths)} widths")
        require(0 <= self.mamba <= self.depths[-1], "mamba", self.mamba, f"in 0..{self.depths[-1]}, the last depth")
        require(self.stem in (1, 2, 4), "stem", self.stem, "1, 2 or 4")
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "in [0, 1)")

    @property
    def side(self) -> int:
        """Of the last stage's grid: every stride of 2 halves it, upwards."""
        stride: int = self.stem * 2 ** (len(self.widths) - 1)
        return -(-self.img_resolution // stride)


SIZES: dict[str, dict[str, Any]] = {
    "S": {"widths": (32, 64, 144, 288), "depths": (4, 4, 12, 8)},
    "M": {"widths": (48, 96, 224, 448), "depths": (4, 4, 12, 6)},
    "B": {"widths": (64, 128, 320, 512), "depths": (4, 4, 12, 6)},
}
"""The published ones."""


class VCMamba(Network):
    """[N, C, H, W] -> features, a token for each cell of the last grid, and logits."""

    config_class: ClassVar[type[NetworkConfig]] = VCMambaConfig

    def __init__(self, config: VCMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = _stem(config)
        drops = iter(torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist())
        scanning = [False] * (sum(config.depths) - config.mamba) + [True] * config.mamba
        scans = iter(scanning)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    MambaBlock(w, drop=next(drops), official_compat=config.official_compat)
                    if next(scans)
                    else ConvBlock(w, drop=next(drops))
                    for _ in range(depth)
                )
            )
            for w, depth in zip(config.widths, config.depths, strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inner, outer, 3, 2, 1), nn.BatchNorm2d(outer))
            for inner, outer in zip(config.widths, config.widths[1:], strict=False)
        )
        width = config.widths[-1]
        self.place = nn.Parameter(torch.zeros(1, width, config.side, config.side)) if config.mamba else None
        self.norm = nn.LayerNorm(width)
        self.head, self.taught = nn.Linear(width, config.num_classes), nn.Linear(width, config.num_classes)
        for layer in (self.head, self.taught):
            nn.init.trunc_normal_(layer.weight, std=STD, a=-2 * STD, b=2 * STD)
            nn.init.zeros_(layer.bias)
        if self.place is not None:
            nn.init.trunc_normal_(self.place, std=STD, a=-2 * STD, b=2 * STD)

    def forward(self, images: Tensor) -> Encoding:
        """images: of `img_resolution`, or of another one, for which the map of positions is enlarged (bicubic)."""
        x = self.stem(images)
        for i, stage in enumerate(self.stages):
            x = self.downs[i - 1](x) if i else x
            for block in stage.children():
                x = block(x if block is not self._first else x + self._placed(x))
        grid = (x.shape[2], x.shape[3])
        tokens = self.norm(x.flatten(2).mT)
        pooled = tokens.mean(1)
        logits, taught = self.head(pooled), self.taught(pooled)
        if self.training:
            return Encoding(pooled, tokens, grid, logits, taught)
        return Encoding(pooled, tokens, grid, (logits + taught) / 2)

    @property
    def _first(self) -> nn.Module | None:
        """The first block that scans."""
        last = self.stages[-1]
        assert isinstance(last, nn.Sequential)
        return last[-self.config.mamba] if self.config.mamba else None

    def _placed(self, x: Tensor) -> Tensor:
        assert self.place is not None
        if x.shape[2:] == self.place.shape[2:]:
            return self.place
        return F.interpolate(self.place, size=x.shape[2:], mode="bicubic", align_corners=False)


class ConvBlock(nn.Module):
    """x + scale MLP(x), [N, width, H, W]."""

    def __init__(self, width: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.mlp = Mlp(width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), SCALE))

    def forward(self, x: Tensor) -> Tensor:
        return x + _branch(self.scale * self.mlp(x), self.drop, self.training)


class MambaBlock(nn.Module):
    """x + SSM(norm x), then x + MLP(norm x), [N, width, H, W]; scans: of the four orders, how many."""

    def __init__(self, width: int, *, drop: float = 0.0, official_compat: bool = False, scans: int = SCANS) -> None:
        super().__init__()
        self.drop = drop
        self.norm, self.again = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.ssm = GridScan(width, official_compat=official_compat, scans=scans)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + _branch(self.ssm(self.norm(x)), self.drop, self.training)
        return x + _branch(self.mlp(self.again(x)), self.drop, self.training)


class Mlp(nn.Module):
    """1x1, depthwise 3x3, 1x1, each with its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = EXPANSION * width
        self.one, self.two = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.middle = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.norms = nn.ModuleList([nn.BatchNorm2d(inner), nn.BatchNorm2d(inner), nn.BatchNorm2d(width)])
        for layer in (self.one, self.two):
            nn.init.trunc_normal_(layer.weight, std=STD, a=-2 * STD, b=2 * STD)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norms[0](self.one(x)))
        x = F.gelu(self.norms[1](self.middle(x)))
        out: Tensor = self.norms[2](self.two(x))
        return out


class GridScan(nn.Module):
    """The state-space part: [N, width, H, W] -> the same; every cell hears of every other one."""

    def __init__(self, width: int, *, official_compat: bool, scans: int) -> None:
        super().__init__()
        inner, rank = INNER * width, math.ceil(width / 16)
        self.rank, self.scans, self.official_compat = rank, scans, official_compat
        self.enter = nn.Sequential(nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner))
        self.near = nn.Conv2d(inner, inner, 7, padding=3, groups=inner)
        self.told = nn.Linear(inner, rank + 2 * STATE, bias=False)
        self.steps = nn.Linear(rank, inner)
        self.log_rate = nn.Parameter(torch.arange(1, STATE + 1).float().log().expand(inner, -1).clone())
        self.skip = nn.Parameter(torch.ones(inner))
        self.moves = nn.Parameter(torch.zeros(MOVES, STATE))
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width))
        for weight in (self.moves, self.told.weight, self.steps.weight):
            nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD)
        if official_compat:
            nn.init.zeros_(self.steps.bias)
            return
        nn.init.uniform_(self.steps.weight, -(rank**-0.5), rank**-0.5)
        low, high = (math.log(s) for s in STEPS)
        with torch.no_grad():
            first = torch.empty_like(self.steps.bias).uniform_(low, high).exp()
            self.steps.bias.copy_(first + torch.log(-torch.expm1(-first)))  # softplus undone

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        u = F.silu(self.near(self.enter(x))).flatten(2).permute(2, 0, 1)  # [L, N, E]
        step, b, c = self.told(u).split([self.rank, STATE, STATE], 2)
        step = self.steps(step) + (self.steps.bias if self.official_compat else 0)
        with uncast(x.device):
            u, step, b, c = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (u, step, b, c))
            y = self.norm(self._scanned(u, F.softplus(step), b, c, height, width))
        out: Tensor = self.leave(y.permute(1, 2, 0).reshape(len(x), -1, height, width))
        return out

    def _scanned(self, u: Tensor, step: Tensor, b: Tensor, c: Tensor, height: int, width: int) -> Tensor:
        """The sum of all scans, each put back into raster order; side by side they are one scan of wider batches."""
        orders, moves = (t[: self.scans].to(u.device) for t in snakes(height, width))

        def beside(t: Tensor, ordered: bool = True) -> Tensor:
            return t[orders.T].flatten(1, 2) if ordered else t.repeat(1, len(orders), 1)

        entered = self.moves[moves.T].to(u.dtype).repeat_interleave(u.shape[1], 1)
        along = not self.official_compat
        rate = -self.log_rate.to(u.dtype).exp()
        told = beside(step, along), rate, beside(b, along) + entered, beside(c, along)
        y = selective_scan(beside(u), *told, self.skip.to(u.dtype)).view(len(u), len(orders), *u.shape[1:])
        return torch.zeros_like(u).index_add(0, orders.T.flatten(), y.flatten(0, 1))


@lru_cache
def snakes(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Four orders in which to visit the cells of a grid, and by which move each is entered: int64 [4, height width]."""
    with torch.device("cpu"):
        grid = torch.arange(height * width).view(height, width)
        orders = []
        for lines in (grid, grid.T):
            turned = torch.where(torch.arange(len(lines))[:, None] % 2 == 1, lines.flip(1), lines).flatten()
            orders += [turned, turned.flip(0)]
        order = torch.stack(orders)
        down, right = (torch.diff(t, dim=1) for t in (order // width, order % width))
        entered = 1 * (right == 1) + 2 * (right == -1) + 3 * (down == -1) + 4 * (down == 1)
        return order, F.pad(entered, (1, 0))


def _branch(added: Tensor, drop: float, training: bool) -> Tensor:
    """What a branch adds, dropped for a whole image with a probability."""
    if not drop or not training:
        return added
    return added * dropout(added.new_ones(len(added), 1, 1, 1), drop, training)


def _stem(config: VCMambaConfig) -> nn.Sequential:
    first, width = config.widths[0] // 2, config.widths[0]
    strides = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[config.stem]
    layers: list[nn.Module] = []
    for inner, outer, stride in zip((config.in_channels, first), (first, width), strides, strict=True):
        conv = nn.Conv2d(inner, outer, 3, stride, 1)
        std = (9 * inner) ** -0.5 / 0.87962566  # LeCun's: the deviation of what is left of a normal cut at two
        nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        layers += [conv, nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers)
