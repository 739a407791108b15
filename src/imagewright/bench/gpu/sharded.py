"""Part e: a step of the large network sharded by PyTorch's own `fully_shard`, on a world of one.

One card cannot show what sharding saves; it shows what it costs, and what recomputing activations by block saves. The
memory of weights, gradients and moments of a rank among several is said beside it, as arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from imagewright.bench.gpu.scale import MadeUp, Scale
from imagewright.bench.gpu.timing import Deadline, Numbers, forget, peak_bytes, timed
from imagewright.bench.gpu.training import RECIPE, built
from imagewright.types import Condition

WORLDS = (1, 8, 32)
WAYS = (
    ("whole", False, False),
    ("recomputed", False, True),
    ("sharded", True, False),
    ("sharded, recomputed", True, True),
)
"""Name, whether blocks are sharded, whether they are recomputed."""


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """Forward, backward and Adam in bf16: whole, with blocks recomputed, and sharded by block."""
    batch = max(scale.batch // 4, 1)
    own["batch"] = batch
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        for name, shard, recompute in WAYS[:: 3 if scale.toy else 1]:
            deadline.check()
            forget(device)
            own[name] = _step(scale, device, batch, shard, recompute)
    finally:
        dist.destroy_process_group()
    count = own["whole"]["parameters"]
    own["state_bytes_of_a_rank"] = {str(world): 16 * count // world for world in WORLDS}


def _step(scale: Scale, device: torch.device, batch: int, shard: bool, recompute: bool) -> Numbers:
    from torch.distributed.fsdp import fully_shard

    made = built(scale.experiment(RECIPE), MadeUp(scale), device)
    model: Any = made.parts.roles["denoiser"].module.to(device).train()
    count = sum(p.numel() for p in model.parameters())
    for block in model.network.blocks().values():
        block.recompute = recompute
        if shard:
            fully_shard(block)
    if shard:
        fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    spec = made.images.spec
    images = torch.rand(batch, *spec.shape, device=device) * 2 - 1
    cond = Condition(label=torch.randint(spec.num_classes, (batch,), device=device))

    def step() -> None:
        sigma = (torch.randn(batch, device=device) * 1.2 - 1.2).exp()
        with torch.autocast(device.type, torch.bfloat16):
            loss = (
                model(images + sigma[:, None, None, None] * torch.randn_like(images), sigma, cond) - images
            ).square()
        torch.autograd.backward(loss.mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    found = timed(step, device, min(2, scale.warm), min(5, scale.timed))
    return found | {
        "images_per_second": batch / found["seconds"],
        "peak_bytes": peak_bytes(device),
        "parameters": count,
    }
