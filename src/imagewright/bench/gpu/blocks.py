"""Single residual blocks of ADM, forward and backward: as they are, and through torch.compile.

A block is compiled in seconds, a whole network in minutes; what compiling is worth shows in the block.
"""

from __future__ import annotations

import time

import torch

from imagewright.bench.gpu.scale import Scale
from imagewright.bench.gpu.timing import Deadline, Numbers, aside, forget, kernels, timed
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig

KINDS = ("dec.64x64_block1", "enc.32x32_block1")
"""By name, in ADM for ImageNet-64: the costliest, and one with attention."""
MOST = 30.0
"""Seconds for one block."""


def measure(own: Numbers, scale: Scale, device: torch.device, deadline: Deadline) -> None:
    """Milliseconds a block in both ways, in bf16 with channels last, without dropout, whose numbers differ."""
    config = DhariwalUNetConfig(img_resolution=scale.side, in_channels=3, out_channels=3, dropout=0.0)
    if scale.toy:
        return
    with torch.device(device):
        network = DhariwalUNet(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    blocks = network.blocks()
    for name in KINDS:
        with aside(own, name, deadline, scale.most(MOST)) as found:
            forget(device)
            block = blocks[name]
            side = int(name.split(".")[1].split("x")[0])
            x = torch.randn(scale.batch, block.norm0.num_channels, side, side, device=device)
            x = x.bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
            emb = torch.randn(scale.batch, block.style.emb_channels, device=device)

            def step(block: torch.nn.Module = block, x: torch.Tensor = x, emb: torch.Tensor = emb) -> None:
                with torch.autocast(device.type, torch.bfloat16):
                    y = block(x, emb)
                torch.autograd.backward(y, torch.ones_like(y))
                block.zero_grad(set_to_none=True)
                x.grad = None

            found["eager"] = timed(step, device, scale.warm, scale.timed)
            found["eager kernels"] = kernels(step, device, 12)
            block.compile(dynamic=False)
            started = time.monotonic()
            step()
            found["compiling"] = time.monotonic() - started
            found["compiled"] = timed(step, device, scale.warm, scale.timed)
            found["compiled kernels"] = kernels(step, device, 12)
