"""Layer skipping: run a U-Net without some of its layers, others at each noise level.

Source       AutoDiffusion (Li et al. 2023, arXiv 2309.10438); `tuning.autodiffusion` searches what to skip.
Layers       Every block of the network, in the order of execution (encoder, then decoder), is a layer "residual";
             a block with attention is followed by a layer "attention". They are numbered 0, 1, 2, ... (`layers_of`).
Ingredients  a skipped residual layer is its shortcut alone: identity, 1x1 convolution and resampling stay; a skipped
             attention is the identity. Skipped layers are not computed. Nothing is trained, weights are shared.
Departs      from lilijiangg/AutoDiffusion, guided_diffusion/dynamic_unet.py, in one thing: networks whose residual sums
             are scaled (DDPM++, by sqrt(1/2), to keep the variance) leave the scale out where nothing is added. The
             published code knows ADM alone, whose scale is 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from imagewright.errors import an
from imagewright.models.preconditioning import Preconditioned
from imagewright.networks.block import UNetBlock
from imagewright.networks.unet import UNet
from imagewright.types import UNCONDITIONAL, Condition, UserError


@dataclass(frozen=True)
class SkippableLayer:
    """One layer that may be left out. id: its number; block: its block's name, "enc.8x8_block0"."""

    id: int
    block: str
    kind: Literal["residual", "attention"]


def layers_of(network: UNet) -> list[SkippableLayer]:
    """All layers that may be skipped; layer i of the list has id i."""
    found: list[SkippableLayer] = []
    for name, block in network.blocks().items():
        found.append(SkippableLayer(len(found), name, "residual"))
        if block.num_heads:
            found.append(SkippableLayer(len(found), name, "attention"))
    return found


class PartOfBlock(nn.Module):
    """A block without its residual layer, its attention, or both; shares the block's weights."""

    def __init__(self, block: UNetBlock, kinds: Collection[str]) -> None:
        super().__init__()
        self.block, self.kinds = block, kinds

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """As `UNetBlock.forward`."""
        x = self.block.shortcut(x) if "residual" in self.kinds else self.block.residual(x, emb)
        return x if "attention" in self.kinds else self.block.attended(x)


def without_layers(network: UNet, ids: Collection[int]) -> UNet:
    """The network without these layers, sharing its weights; the network itself stays as it is.

    Raises UserError for an id that it does not have.
    """
    layers = layers_of(network)
    unknown = sorted(i for i in ids if not 0 <= i < len(layers))
    if unknown:
        raise UserError(f"skipped layer {unknown[0]} does not exist; this network has layers 0 to {len(layers) - 1}")
    kinds: dict[str, list[str]] = {}
    for i in ids:
        kinds.setdefault(layers[i].block, []).append(layers[i].kind)
    blocks = network.blocks()
    return network.with_blocks({name: PartOfBlock(blocks[name], left_out) for name, left_out in kinds.items()})


class LayerSkipped(nn.Module):
    """A denoiser whose U-Net skips layers: again a `Denoiser`.

    skips: noise level (> 0) -> ids of the layers left out; a call uses the entry whose level is nearest in ln sigma. An
    entry without ids is the plain denoiser, bit for bit. Raises UserError for a denoiser that has no U-Net, an empty
    table, a level outside its range and an unknown layer.
    """

    def __init__(self, denoiser: nn.Module, skips: Mapping[float, Collection[int]]) -> None:
        super().__init__()
        if not (isinstance(denoiser, Preconditioned) and isinstance(denoiser.network, UNet)):
            raise UserError(
                f"layer skipping needs a denoiser made of a U-Net; this model is {an(type(denoiser).__name__)}"
            )
        if not skips or not all(0 < level < math.inf for level in skips):
            raise UserError(f"skips has the noise levels {list(skips)}; there must be one or more, positive and finite")
        self.denoiser = denoiser
        self.skips = {float(level): tuple(sorted(set(ids))) for level, ids in skips.items()}
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        for ids in self.skips.values():
            without_layers(denoiser.network, ids)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """As `types.Denoiser`; images of one call may lie at different levels."""
        entries = self._entries(sigma.reshape(-1).expand(len(x)))
        present = sorted(set(entries.tolist()))
        if len(present) == 1:
            return self._at(present[0], x, sigma, cond)
        out = torch.empty_like(x)
        for entry in present:
            rows = entries == entry
            out[rows] = self._at(entry, x[rows], sigma[rows], cond[rows])
        return out

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The denoiser's."""
        return self.denoiser.round_sigma(sigma)

    def executed(self, sigma: float) -> int:
        """Layers that one call at this noise level computes."""
        network = cast(UNet, self.denoiser.network)
        return len(layers_of(network)) - len(self._ids(int(self._entries(torch.tensor([sigma])))))

    def _entries(self, sigma: Tensor) -> Tensor:
        """Index of each level's nearest entry, int64 [N]."""
        table = torch.tensor(list(self.skips), dtype=torch.float64, device=sigma.device).log()
        return (sigma.double().log()[:, None] - table).abs().argmin(1)

    def _ids(self, entry: int) -> tuple[int, ...]:
        return list(self.skips.values())[entry]

    def _at(self, entry: int, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        ids = self._ids(entry)
        if not ids:
            return cast(Tensor, self.denoiser(x, sigma, cond))
        # Made for the call: a shallow copy costs microseconds, and always sees the network's current mode and device.
        return self.denoiser.through(without_layers(cast(UNet, self.denoiser.network), ids), x, sigma, cond)
