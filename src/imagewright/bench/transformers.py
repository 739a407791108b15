"""What a transformer on patches costs, against PyTorch's own of the same sizes.

Both     256 tokens of 384, four layers of six heads, and as many weights in a layer's matrices: SwiGLU's middle is two
         thirds of the 1536 that two layers have.
Ours     has, beside that, the layers in and out, the noise level's and class's, and in each layer one that makes of
         these scales, shifts and gates; RMSNorm, positions that turn queries and keys, and the gates themselves.
Peer     `torch.nn.TransformerEncoder`: LayerNorm, GELU, ready tokens, none of that. Without gradients it takes
         PyTorch's fast way, a layer in one call of C++, whose attention makes the whole matrix of scores on a CPU.
"""

from __future__ import annotations

import torch
from torch import nn

from imagewright.bench.speed import Ratio, alternate, own_clock
from imagewright.networks import DiT, DiTConfig
from imagewright.types import Condition

WIDTH, DEPTH, HEADS, SIDE, CHANNELS = 384, 4, 6, 16, 32
"""Of both; 256 tokens of 32 channels, as LightningDiT's latents have."""


def measure_transformer(device: torch.device, rounds: int) -> Ratio:
    """LightningDiT's forward pass, its condition included, against torch's encoder of as many layers and weights in its
    matrices, on ready tokens.

    details: the same for a forward and a backward pass.
    """
    batch, clock = 64 if device.type == "cuda" else 4, own_clock(device)
    network = DiT(
        DiTConfig(img_resolution=SIDE, in_channels=CHANNELS, out_channels=CHANNELS, label_dim=10, width=WIDTH,
                  depth=DEPTH, heads=HEADS)
    ).to(device)  # fmt: skip
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, device=device
    )
    bare = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    x, level = torch.randn(batch, CHANNELS, SIDE, SIDE, device=device), torch.rand(batch, device=device)
    cond = Condition(label=torch.arange(batch, device=device) % 10)
    tokens = torch.randn(batch, SIDE**2, WIDTH, device=device)

    @torch.no_grad()
    def ours() -> None:
        network.eval()(x, level, cond)

    @torch.no_grad()
    def theirs() -> None:
        bare.eval()(tokens)

    mine, other, ratios = alternate(ours, theirs, device, rounds, batch, clock)
    network.train(), bare.train()
    _, _, (both, _, _) = alternate(
        lambda: torch.autograd.backward(network(x, level, cond).square().mean()),
        lambda: torch.autograd.backward(bare(tokens).square().mean()),
        device,
        max(rounds // 3, 1),
        batch,
        clock,
    )
    details = {"ratio with the backward pass": both}
    return Ratio("LightningDiT's forward", mine, "torch.nn.TransformerEncoder", other, *ratios, details=details)
