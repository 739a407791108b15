"""The Routing Transformer's network (Roy et al. 2020, arXiv 2003.05997): who sees whom is learnt, by clustering.

Heads      some local (blocks of `block` places that see themselves and the block before), the others routing. Routing
           queries are their keys (shared QK), pass a LayerNorm without gain and bias over the head's numbers, and are
           not scaled again: logits are inner products of vectors of norm sqrt(D).
Clusters   k centroids per block and head. A cluster's members are the w places with the largest inner product with its
           centroid: as many in each, in some clusters or in none. They see each other, in their order in the sequence,
           causally. What a place gets from several clusters is averaged: sum / (count + 0.01); in none, it gets 0.
Centroids  no gradient: moving averages (0.999) of the count and the sum of the vectors nearest to each, by inner
           product, over the whole step's batch and all processes, with Laplace smoothing of the counts (1e-5). The
           method adds the commitment loss (`methods.routing_transformer`).
Selection  The paper, teacher-forced, takes the w members of the whole sequence: no value comes from later, but a later
           place may push an earlier one out of its cluster, so that the figure is not quite the likelihood of what is
           sampled. Here that is how it is trained (`selection` "global"); asked for a likelihood or a sample (in eval
           mode), a place's clusters are the w largest of the places up to itself ("causal"), as the released decoder
           has it. `selecting` asks for either; the difference is reported in docs/tokens.md.
Blocks     post-norm, LN(h + dropout(f(h))); two layers with ReLU; dropout on the input, too. No bias of attention's.
Input      values' vectors of each channel's own table, times sqrt(width); rows' and columns' vectors of the place that
           is answered, of each channel's own table, too.
Init       uniform with variance 0.2 / fan, the average of both; positions' vectors N(0, 1); centroids normal, as the
           vectors they average, by LayerNorm.
Source     google-research/google-research, routing_transformer/ (utils.py, sparse_image_transformer.py).
Departs    The released layer that mixes a head's numbers again before the output's, and the keys of routing heads that
           nothing reads, are left out: both add parameters and no function; with the first, what a block's heads add
           begins 0.45 times as large there. The released counts of a step are by mistake not each head's: a reshape
           takes places for heads, so that a head's sums are divided by about the average of all heads' counts, which
           makes the centroids of its larger clusters longer; here by its own. Its LayerNorm follows the division by
           sqrt(D), which its 1e-6 alone notices. Heads that see other clusters ("cluster-strided"), hashing and
           relative positions are not built in. The strictly causal selection in parallel costs n times k w numbers
           compared, a few times more than the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.networks.causal_body import Body, CausalBody, CausalConfig
from imagewright.networks.config import require
from imagewright.networks.patterns import LookBack, Memory, Pattern
from imagewright.networks.residual import Style
from imagewright.networks.sparse_patterns import Split
from imagewright.noise import computing_again
from imagewright.precision import uncast

Selection = Literal["global", "causal"]
GAIN = 0.2
NORM_EPS = 1e-6
SMOOTHING = 1e-5
SHARE = 1e-2
"""Added to how many clusters a place is in."""
CHUNK = 1 << 20
"""Members of clusters that the strictly causal selection holds at a time."""
PLACES = 16
"""Places that it looks at together, if need be of fewer images at a time: one by one takes several times as long."""


@dataclass(frozen=True, kw_only=True)
class RoutingTransformerConfig(CausalConfig):
    """Arguments of `RoutingTransformer`. Raises UserError on a value outside its range."""

    routing_heads: int = 4
    """Of the heads; the others are local."""
    clusters: int = 8
    """k."""
    window: int = 0
    """w, members of a cluster, at most all tokens; 0 = length / clusters."""
    block: int = 256
    """Of local attention."""
    decay: float = 0.999
    """Of the centroids' moving averages, each optimiser step."""
    selection: Selection = "global"
    """In training: members of the whole sequence, or of the places up to the one that asks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("routing_heads", "clusters", "block"):
            self.require_whole(name, 1)
        self.require_whole("window", 0)
        require(self.routing_heads <= self.heads, "routing_heads", self.routing_heads, f"at most heads, {self.heads}")
        require(0 <= self.decay < 1, "decay", self.decay, "in [0, 1)")
        require(self.selection in ("global", "causal"), "selection", self.selection, "global, causal")

    @property
    def members(self) -> int:
        """w, as it is."""
        return min(self.window or -(-self.length // self.clusters), self.length)


class Routing(Pattern):
    """Attention within clusters; queries are keys. Trains its centroids by `settle`."""

    fused = False
    centroids: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, heads: int, clusters: int, members: int, width: int, decay: float, selection: Selection) -> None:
        super().__init__()
        self.members, self.decay, self.selection = members, decay, selection
        self.asked: Selection = "causal"
        """The selection in eval mode."""
        self.commitment: Tensor | None = None
        """Of the last training pass: mean square distance to the nearest centroid, [N]."""
        centroids = F.layer_norm(torch.randn(heads, clusters, width), (width,), eps=NORM_EPS)
        self.register_buffer("centroids", centroids)
        self.register_buffer("ema_count", torch.zeros(heads, clusters))
        self.register_buffer("ema_sum", centroids.clone())
        # Of the step at hand; zeros between steps.
        self.register_buffer("count", torch.zeros(heads, clusters), persistent=False)
        self.register_buffer("total", torch.zeros_like(centroids), persistent=False)

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        x, scores = self._scored(query)
        if self.training:
            self._learn(x, scores)
        among = self._global if (self.selection if self.training else self.asked) == "global" else self._causal
        return among(x, value, scores)

    def allows(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query  # who among these, the numbers say

    def _scored(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised vectors [N, heads, L, D], and their inner products with the centroids [N, heads, L, k]."""
        x = F.layer_norm(query, query.shape[-1:], eps=NORM_EPS)
        with uncast(query.device):  # who is in which cluster is no matter of 8 bits
            scores = x.to(self.centroids.dtype) @ self.centroids.mT
        return x, scores.detach()

    def _global(self, x: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        """Members of the whole sequence."""
        rows = scores.mT.topk(self.members, -1).indices.sort(-1).values  # [N, heads, k, w]
        own, their = (_gathered(t, rows) for t in (x, value))
        flat = rows.flatten(2)[..., None]
        mixed = F.scaled_dot_product_attention(own, own, their, is_causal=True, scale=1.0).flatten(2, 3)
        out = torch.zeros_like(value, dtype=mixed.dtype).scatter_add(2, flat.expand_as(mixed), mixed)
        count = torch.zeros_like(out[..., :1]).scatter_add(2, flat, torch.ones_like(mixed[..., :1]))
        return out / (count + SHARE)

    def _causal(self, x: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        """Members of the places up to the one that asks: a block of places at a time, with each cluster's w largest so
        far."""
        n, heads, length, k = scores.shape
        together = max(1, CHUNK // (PLACES * heads * k * self.members))
        if n > together:
            pieces = zip(*(torch.split(t, together) for t in (x, value, scores)), strict=True)
            return torch.cat([self._causal(*piece) for piece in pieces])
        block = max(1, min(CHUNK // (n * heads * k * self.members), self.members))
        best, members = (
            scores.new_empty(n, heads, k, 0),
            torch.empty(n, heads, k, 0, dtype=torch.int64, device=x.device),
        )
        found = []
        for start in range(0, length, block):
            place = torch.arange(start, min(start + block, length), device=x.device)
            new = scores[:, :, place].mT[:, :, None].expand(-1, -1, len(place), -1, -1)  # [N, heads, T, k, T]
            new = new.masked_fill((place > place[:, None])[:, None], -torch.inf)
            known = torch.cat([best[:, :, None].expand(*new.shape[:4], -1), new], -1)
            largest = known.topk(min(self.members, known.shape[-1]), -1)
            where = torch.cat([members, place.expand(n, heads, k, -1)], -1)[:, :, None].expand_as(known)
            rows = where.gather(-1, largest.indices)
            inside = scores[:, :, place] >= largest.values[..., -1]  # [N, heads, T, k]
            found.append(self._among(x[:, :, place], x, value, rows, largest.values > -torch.inf, inside))
            best, members = largest.values[:, :, -1], rows[:, :, -1]
        return torch.cat(found, 2)

    def _among(self, query: Tensor, x: Tensor, value: Tensor, rows: Tensor, valid: Tensor, inside: Tensor) -> Tensor:
        """What queries [N, heads, T, D] get of the members, rows of x [N, heads, T, k, w], of clusters they are in.

        valid: which of the rows are members, the same shape. inside: whether a query is, [N, heads, T, k].
        """
        most = int(inside.sum(-1).max())
        if not most:
            return torch.zeros_like(query[..., :1]).expand(*query.shape[:3], value.shape[3])
        picked = inside.to(torch.uint8).topk(most, -1).indices  # the clusters of each query, and some others
        chosen = picked[..., None].expand(*picked.shape, rows.shape[-1])
        rows, valid = rows.gather(3, chosen), valid.gather(3, chosen)
        n, heads, t, m, w = rows.shape
        flat = rows.reshape(n, heads, t * m, w)
        own, their = (_gathered(each, flat).view(n, heads, t, m, w, -1) for each in (x, value))
        logits = (own @ query[:, :, :, None, :, None])[..., 0].masked_fill(~valid, -torch.inf)
        counts = inside.gather(3, picked)[..., None].to(value.dtype)
        mixed: Tensor = (logits.softmax(-1)[..., None, :] @ their)[..., 0, :] * counts
        return mixed.sum(3) / (counts.sum(3) + SHARE)

    def _learn(self, x: Tensor, scores: Tensor) -> None:
        """Note the commitment, and, once a pass, what the centroids shall move to."""
        nearest = scores.argmax(-1)
        near = self.centroids[torch.arange(len(self.centroids), device=x.device)[:, None], nearest]
        commitment = (x - near).square().flatten(1).mean(1)
        if computing_again():
            return
        self.commitment = commitment
        with torch.no_grad():
            hot = F.one_hot(nearest, self.centroids.shape[1]).to(self.centroids)
            self.count += hot.sum((0, 2))
            self.total += torch.einsum("nhlk,nhld->hkd", hot, x.detach().to(self.centroids))

    @torch.no_grad()
    def settle(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Move the centroids by what the step's passes noted. summed: of a tensor over all processes."""
        noted = summed(torch.cat([self.count[..., None], self.total], -1))
        self.ema_count.lerp_(noted[..., 0], 1 - self.decay)
        self.ema_sum.lerp_(noted[..., 1:], 1 - self.decay)
        whole = self.ema_count.sum(-1, keepdim=True)
        smooth = (self.ema_count + SMOOTHING) / (whole + self.ema_count.shape[1] * SMOOTHING) * whole
        self.centroids.copy_(self.ema_sum / smooth[..., None])
        self.count.zero_()
        self.total.zero_()

    def memory(self) -> Memory:
        """Vectors and values; and the scores, as keys."""
        return Memory(parts=(Memory(), Memory()))

    def step(self, query: Tensor, key: Tensor, value: Tensor, memory: Memory, place: int, length: int) -> Tensor:
        x, scores = self._scored(query)
        upto = (slice(0, place + 1),)
        kept, marks = memory.parts
        kept.put(length, place, x, value)
        marks.put(length, place, scores, scores)
        xs, values = kept.read(upto)
        known = marks.read(upto)[0].mT  # [N, heads, k, place + 1]
        best = known.topk(min(self.members, place + 1), -1)
        inside = known[..., -1] >= best.values[..., -1]  # [N, heads, k]
        rows = best.indices[:, :, None]
        return self._among(x, xs, values, rows, torch.ones_like(rows, dtype=torch.bool), inside[:, :, None])


class RoutingTransformer(CausalBody):
    """(tokens, time, cond) -> logits; time is ignored."""

    config_class: ClassVar[type[RoutingTransformerConfig]] = RoutingTransformerConfig
    config: RoutingTransformerConfig
    BODY: ClassVar[Body] = Body(
        post_norm=True, eps=1e-6, final_eps=None, activation="relu", bias=False, answered=True, by_channel=True,
        scale=True,
    )  # fmt: skip

    def style(self) -> Style:
        return replace(super().style(), shared=self.config.routing_heads)

    def pattern(self, block: int) -> Pattern:
        c = self.config
        routing = Routing(c.routing_heads, c.clusters, c.members, c.width // c.heads, c.decay, c.selection)
        if c.routing_heads == c.heads:
            return routing
        return Split([routing, LookBack(c.block)], [c.routing_heads, c.heads - c.routing_heads])

    def routings(self) -> list[Routing]:
        """Those of all blocks."""
        return [module for module in self.modules() if isinstance(module, Routing)]

    def commitment(self) -> Tensor:
        """Of the last training pass, summed over the blocks, [N]; to be asked for once."""
        noted = [r.commitment for r in self.routings() if r.commitment is not None]
        for routing in self.routings():  # what is part of a graph is no part of a module, which may be copied
            routing.commitment = None
        return torch.stack(noted).sum(0)

    @contextmanager
    def selecting(self, selection: Selection) -> Iterator[None]:
        """While the body runs, answers in eval mode are by this selection."""
        for routing in self.routings():
            routing.asked = selection
        try:
            yield
        finally:
            for routing in self.routings():
                routing.asked = "causal"

    @torch.no_grad()
    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                parts = self._parts(module)
                for weight, (_, published) in zip(
                    torch.split(module.weight, [p[0] for p in parts]), parts, strict=True
                ):
                    _uniform(weight, published)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        _uniform(self.tokens.weight, len(self.tokens.weight))
        for table in self.positions:
            nn.init.normal_(table)

    def _parts(self, module: nn.Linear) -> list[tuple[int, int]]:
        """Layers that the published program has apart, in one of ours: their rows, and how many it has there."""
        if any(module is block.qkv for block in self.blocks):
            queries, keys = self.style().keys
            values = self.config.width
            return [part for part in ((queries, queries), (keys, queries), (values, values)) if part[0]]
        return [(module.out_features, module.out_features)]


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    """Places [N, heads, k, w] of vectors [N, heads, L, D]: [N, heads, k, w, D]."""
    flat = rows.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, flat).view(*rows.shape, x.shape[3])


def _uniform(weight: Tensor, rows: int) -> None:
    """With variance 0.2 over the average of both fans, of the columns and of so many rows."""
    bound = (3 * GAIN / ((rows + weight.shape[1]) / 2)) ** 0.5
    nn.init.uniform_(weight, -bound, bound)
