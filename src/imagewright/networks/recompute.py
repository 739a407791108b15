"""The blocks of which large networks are made: what is computed twice, or sharded, as one (docs/distributed.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from imagewright import noise
from imagewright.networks.tangents import has_tangent


class Block(nn.Module):
    """A piece of a network, from tensors to a tensor by its `forward`, which changes nothing of its own.

    recompute: what is inside is not kept for backward but computed again, with the same dropout.
    """

    recompute = False

    def __call__(self, *args: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        if self._compiled_call_impl is not None and (transformed or any(map(has_tangent, args))):
            # What torch.compile makes of it has no forward-mode derivative.
            return self._call_impl(*args)  # type: ignore[no-untyped-call]
        # Transforms of torch.func know no saved tensors that are made anew.
        if self.recompute and torch.is_grad_enabled() and not transformed:
            return checkpoint(super().__call__, *args, use_reentrant=False, context_fn=noise.twice)
        return super().__call__(*args)


def blocks(module: nn.Module) -> Iterator[Block]:
    """The outermost blocks of a network."""
    for child in module.children():
        if isinstance(child, Block):
            yield child
        else:
            yield from blocks(child)
