"""VCMamba: four scans tell every cell of every other one; one scan, or convolutions, do not (2509.04669)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imagewright.bench.claims.claim import Budget, Check, Claim, Row, by_how_much
from imagewright.bench.claims.sequences import fitted, held_out
from imagewright.networks.vcmamba import MambaBlock, VCMamba, VCMambaConfig

SIDE = 16
COLOURS = 8
"""Corners of the cube of colours; the ground is its centre."""
WIDTH = 8
FIELD = 6
"""Cells to each side that the stem (2), the 7x7 convolution (3) and the MLP's (1) see together."""
UPDATES, BATCH = 250, 8
RATES = {"four scans": 1e-2, "one scan": 1e-2, "convolutions": 1e-2, "four scans, released quirks": 1e-2}
COUNT = 512
CONVOLUTIONS: dict[str, Any] = {"widths": (9,), "depths": (3,), "mamba": 0}
"""Within 3 % of the parameters of the scanning network."""


def marked(generator: torch.Generator, n: int) -> Tensor:
    """Pictures of one coloured cell on grey, [n, 3, 16, 16]."""
    colour = 2.0 * torch.randint(2, (n, 3), generator=generator) - 1
    place = torch.randint(SIDE**2, (n, 1), generator=generator)
    return (colour[:, :, None] * F.one_hot(place, SIDE**2)).reshape(n, 3, SIDE, SIDE)


def colour_of(pictures: Tensor) -> Tensor:
    """Which of the 8 colours the marker has, int64 [n]."""
    return ((pictures.sum((2, 3)) > 0).long() * torch.tensor([4, 2, 1])).sum(1)


def network(name: str) -> VCMamba:
    """One stage on the whole grid: one scanning block, or three of convolutions with as many parameters."""
    sizes: dict[str, Any] = {"widths": (WIDTH,), "depths": (1,), "mamba": 1} if "scan" in name else CONVOLUTIONS
    quirks = "quirks" in name
    net = VCMamba(VCMambaConfig(img_resolution=SIDE, num_classes=COLOURS, stem=1, official_compat=quirks, **sizes))
    for block in net.modules():
        if isinstance(block, MambaBlock) and name == "one scan":
            block.ssm.scans = 1
    return net


def answers(net: nn.Module, pictures: Tensor) -> Tensor:
    """Logits of the marker's colour at every cell, [n, 256, 8]."""
    assert isinstance(net, VCMamba)
    logits: Tensor = net.head(net(pictures).tokens)
    return logits


def loss(net: nn.Module, pictures: Tensor) -> Tensor:
    """Cross-entropy of the marker's colour, mean over cells."""
    return F.cross_entropy(answers(net, pictures).mT, colour_of(pictures)[:, None].expand(-1, SIDE**2))


@torch.no_grad()
def wrong(net: nn.Module, pictures: Tensor) -> dict[str, float]:
    """Shares of wrong cells: of all, and of those whose row is more than the field above the marker's."""
    miss = (
        torch.cat([answers(net, some).argmax(2) for some in torch.split(pictures, 64)]) != colour_of(pictures)[:, None]
    )
    row = pictures.abs().sum((1, 3)).argmax(1)
    above = torch.arange(SIDE**2) // SIDE < (row - FIELD)[:, None]
    return {"all": float(miss.double().mean()), "above": float(miss[above].double().mean())}


def run(seed: int, budget: Budget) -> Sequence[Row]:
    """Wrong cells of each contender."""
    updates, count = (UPDATES, COUNT) if budget == "full" else (2, 32)
    test, rows = held_out(marked, seed, count), []
    for name, rate in RATES.items():
        make: Callable[[], nn.Module] = partial(network, name)
        net = fitted(make, marked, loss, seed=seed, updates=updates, batch=BATCH, rate=rate)
        found = wrong(net, test)
        rows.append(Row(name=name, score=found["all"], cost=updates, more={"above the field": found["above"]}))
    return rows


CLAIM = Claim(
    key="vcmamba",
    paper="2509.04669",
    headline="",
    miniature="",
    measure="share of wrong cells",
    cost="updates",
    run=run,
    checks=(
        Check(
            says="with four scans fewer than 5 % of all cells are wrong",
            effect=lambda rows: 0.05 - rows.score("four scans"),
        ),
        Check(
            says="above the field by 70 points fewer than with the first scan alone",
            effect=by_how_much("four scans", "one scan", "above the field"),
            margin=0.7,
        ),
        Check(
            says="above the field by 70 points fewer than with convolutions of equal size",
            effect=by_how_much("four scans", "convolutions", "above the field"),
            margin=0.7,
        ),
    ),
)
