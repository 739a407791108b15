"""The Sparse Transformer's network (Child et al. 2019, arXiv 1904.10509): two sparse patterns that reach all together.

Patterns   with stride l of about sqrt(n): *strided*, the last l places and every l-th before; *fixed*, the own block of
           l and the last `cells` of every block, other ones for each head. Combined in three ways: block by block in
           turn (`layers`, the released order is one strided, three local), heads that see the union, or heads divided.
Blocks     pre-norm, x sigmoid(1.702 x), hidden width 4 (2 on CIFAR-10, where queries and keys have half the width).
Input      vectors of row, column and channel of the token that enters are added to it.
Init       every weight N(0, 0.125 / fan in); layers that end a branch N(0, 0.125 / (2 N fan in)), N the number of
           blocks; tokens and start 0.01, the three position tables 0.01 / sqrt(3); logits 0; no bias of the logits.
Dropout    at the end of each branch, none on attention's weights; with `training.recompute` each block is computed
           again for backward under the same masks, as the released program does.
Source     The released code: openai/sparse_attention (patterns), openai/distribution_augmentation (train.py: blocks,
           initialisation; hyperparams.py: c10-58m, i64_150m_32gpu).
Departs    Sizes need not be multiples of 32: kernels of blocks are PyTorch's. The released runs are in float16, the
           loss and Adam's averages, too, with a scale that is searched for; the recipes here in bfloat16. Weight decay
           falls on gains and biases, too (released: matrices alone). `kernel` "flex" computes the same by
           FlexAttention, on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.networks.causal_body import Body, CausalBody, CausalConfig
from imagewright.networks.config import require
from imagewright.networks.patterns import Dense, Pattern, Window
from imagewright.networks.residual import Style
from imagewright.networks.sparse_patterns import Block, Split, Stride, Summary, Union

Layer = Literal["dense", "local", "strided", "block", "summary"]
Combine = Literal["turns", "union", "heads"]
KINDS = get_args(Layer)
GAIN = 0.125
TABLE_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class SparseTransformerConfig(CausalConfig):
    """Arguments of `SparseTransformer`. Raises UserError on a value outside its range."""

    layers: tuple[str, ...] = ("strided", "local", "local", "local")
    """Patterns: of blocks in turn, or what a head sees together, or what heads are divided among."""
    combine: Combine = "turns"
    """turns: block r has pattern r mod p; union: every head of every block sees what both patterns let it; heads: in
    every block, an equal share of the heads for each pattern."""
    stride: int = 0
    """l, also the window and the size of blocks; 0 = the tokens of one row of the image."""
    cells: int = 8
    """Of the fixed pattern: how many cells of a block sum it up, for one head."""
    key_ratio: float = 1.0
    """Width of queries and keys, in units of `width`."""
    kernel: Literal["plain", "flex"] = "plain"
    """flex: local patterns and unions by FlexAttention where the device is a CUDA GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.layers, list | tuple), "layers", self.layers, f"a list of {', '.join(KINDS)}")
        object.__setattr__(self, "layers", tuple(self.layers))
        known = len(self.layers) > 0 and all(layer in KINDS for layer in self.layers)
        require(known, "layers", self.layers, f"a list of {', '.join(KINDS)}")
        require(self.combine in get_args(Combine), "combine", self.combine, ", ".join(get_args(Combine)))
        require(self.kernel in ("plain", "flex"), "kernel", self.kernel, "plain, flex")
        self.require_whole("stride", 0)
        self.require_whole("cells", 1)
        per_head = self.key_ratio * self.width / self.heads
        require(per_head >= 1 and per_head == int(per_head), "key_ratio", self.key_ratio, "a whole width of each head")
        if "summary" in self.layers:
            require(self.spacing % self.cells == 0, "cells", self.cells, f"a divisor of the stride, {self.spacing}")
        if self.combine == "union":
            near_far = len(self.layers) == 2 and set(self.layers) in ({"local", "strided"}, {"block", "summary"})
            require(near_far, "layers", self.layers, "local and strided, or block and summary, to be united")
        if self.combine == "heads":
            count = len(self.layers)
            require(
                self.heads % count == 0, "heads", self.heads, f"a multiple of the {count} patterns that divide them"
            )

    @property
    def spacing(self) -> int:
        """The stride, as it is."""
        return self.stride or self.side * self.channels


class SparseTransformer(CausalBody):
    """(tokens, time, cond) -> logits; time is ignored."""

    config_class: ClassVar[type[SparseTransformerConfig]] = SparseTransformerConfig
    config: SparseTransformerConfig
    BODY: ClassVar[Body] = Body(activation="quick_gelu", final_eps=1e-6, logits_bias=False)

    def style(self) -> Style:
        return replace(super().style(), key_width=round(self.config.key_ratio * self.config.width))

    def pattern(self, block: int) -> Pattern:
        c = self.config
        if c.combine == "turns":
            made = self._single(c.layers[block % len(c.layers)], c.heads)
        elif c.combine == "heads":
            share = c.heads // len(c.layers)
            made = Split([self._single(layer, share) for layer in c.layers], [share] * len(c.layers))
        else:
            made = self._union()
        for each in made.modules():
            if isinstance(each, Pattern):
                each.flex = c.kernel == "flex"
        return made

    def _single(self, layer: str, heads: int) -> Pattern:
        spacing = self.config.spacing
        match layer:
            case "local":
                return Window(spacing)
            case "strided":
                return Stride(spacing)
            case "block":
                return Block(spacing)
            case "summary":
                return Summary(spacing, self.config.cells, heads)
            case _:
                return Dense()

    def _union(self) -> Union:
        c = self.config
        if "local" in c.layers:
            return Union(Window(c.spacing), Stride(c.spacing))
        return Union(Block(c.spacing), Summary(c.spacing, c.cells, c.heads))

    @torch.no_grad()
    def initialise(self) -> None:
        def normal(weight: Tensor, std: float) -> None:
            nn.init.normal_(weight, std=std)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                normal(module.weight, (GAIN / module.in_features) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in (block.out, block.down):
                assert isinstance(layer, nn.Linear)
                normal(layer.weight, (GAIN / layer.in_features / (2 * self.config.depth)) ** 0.5)
        normal(self.tokens.weight, TABLE_STD)
        assert self.first is not None
        normal(self.first, TABLE_STD)
        for table in self.positions:
            normal(table, TABLE_STD / len(self.positions) ** 0.5)
        nn.init.zeros_(self.logits.weight)
