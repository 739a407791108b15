"""Part a: the card's own rates, which the others are held against."""

from __future__ import annotations

from pathlib import Path

import torch

from imagewright.bench.gpu.scale import Scale
from imagewright.bench.gpu.timing import Deadline, Numbers, timed


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """Products of random square matrices in three formats, FLOP/s; a copy, bytes read and written a second."""
    n = scale.matrix
    own["matrix"] = n
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype, tf32 in (
            ("bf16", torch.bfloat16, False),
            ("tf32", torch.float32, True),
            ("fp32", torch.float32, False),
        ):
            deadline.check()
            torch.backends.cuda.matmul.allow_tf32 = tf32
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            found = timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, scale.warm, scale.timed)  # type: ignore[misc]
            own[name] = found | {"flops": 2 * n**3 / found["seconds"]}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    source = torch.randn(scale.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    found = timed(lambda: target.copy_(source), device, scale.warm, scale.timed)
    own["copy"] = found | {"bytes": 2 * scale.copy_bytes / found["seconds"]}
