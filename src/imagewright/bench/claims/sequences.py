"""Made-up sequences of tokens, and a small training of causal networks on them: what several claims share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.noise import derive_seed
from imagewright.types import Settles

Draw = Callable[[torch.Generator, int], Tensor]
"""So many sequences, int64 [n, L]."""
Loss = Callable[[nn.Module, Tensor], Tensor]


def fitted(
    make: Callable[[], nn.Module], draw: Draw, loss: Loss, *, seed: int, updates: int, batch: int, rate: float
) -> nn.Module:
    """A network after so many updates by Adam (0.9, 0.98), a twentieth of them warm-up, half a cosine to the end.

    Equal seeds begin alike, as far as networks have the same layers, and see the same sequences in order.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 0))
        network = make().train()
        data = torch.Generator().manual_seed(derive_seed(seed, 1))
        optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.98))
        for step in range(updates):
            ramp = min(1.0, 20 * (step + 1) / updates)
            optimizer.param_groups[0]["lr"] = rate * ramp * (1 + math.cos(math.pi * step / updates)) / 2
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss(network, draw(data, batch)))
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            for module in network.modules():
                if isinstance(module, Settles):
                    module.settle(lambda tensor: tensor)
    return network.eval()


def held_out(draw: Draw, seed: int, count: int) -> Tensor:
    """Sequences that no training of that seed sees."""
    return draw(torch.Generator().manual_seed(derive_seed(seed, 2)), count)


def nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-ln p of tokens [N, K] under logits [N, K, V], [N, K]."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
