"""Part c: images a second by 35 calls and by one, through `ImageGenerator`, against the bare network's calls alone.

Both sides run the same network, in bf16 by autocast, on equally many images; ours also draws latents by image, steps
in float64 and rounds to bytes. With graphs both replay (`samplers.replay`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from imagewright.bench.gpu.scale import Scale, shrunk
from imagewright.bench.gpu.timing import Deadline, Numbers, aside, forget, timed
from imagewright.models.consistency import ConsistencyModel
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import DhariwalUNet, DhariwalUNetConfig, SongUNet, SongUNetConfig
from imagewright.networks.config import UNetConfig
from imagewright.recipes import RECIPES
from imagewright.samplers import Heun, MultistepConsistency
from imagewright.samplers.generator import ImageGenerator
from imagewright.samplers.replay import Replays
from imagewright.types import Condition, DataSpec, Sampler

BATCHES = 16
"""Of which one measurement consists: the first one's noise, and the fetching of the last, have nothing beside them."""
MOST = 20.0
"""Seconds for one comparison."""


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """A small network at two batch sizes and the large one at one; each at one call and at 35."""
    spec = DataSpec(name="speed", resolution=scale.side, channels=3, num_classes=scale.classes)
    emoji = RECIPES["edm-emoji64-32"]().network
    large = DhariwalUNetConfig(img_resolution=scale.side, in_channels=3, out_channels=3)
    for name, config, batch in (  # the large one first: it is the one that says most
        (f"ADM, {scale.sampled}", large, scale.sampled),
        (f"small, {scale.sampled}", emoji, scale.sampled),
        ("small, 1", emoji, 1),
    ):
        network = _network(config, spec, scale, device)
        own[name] = {"parameters": sum(p.numel() for p in network.parameters()), "batch": batch}
        for calls, graphs in ((1, True), (1, False), (scale.calls, True)):
            key = f"{calls} calls" + (", graphs" if graphs else "")
            count = min(2 if calls > 1 else 3, scale.timed)
            with aside(own[name], key, deadline, scale.most(MOST)) as found:
                found |= _compared(network, spec, batch, calls, graphs, device, count, 2 if scale.toy else BATCHES)
        forget(device)


def _network(config: UNetConfig, spec: DataSpec, scale: Scale, device: torch.device) -> nn.Module:
    config = replace(config, img_resolution=spec.resolution, label_dim=spec.num_classes)
    config = shrunk(config) if scale.toy else config
    with torch.device(device):
        return SongUNet(config) if isinstance(config, SongUNetConfig) else DhariwalUNet(config)  # type: ignore[arg-type]


def _compared(
    network: nn.Module,
    spec: DataSpec,
    batch: int,
    calls: int,
    graphs: bool,
    device: torch.device,
    count: int,
    batches: int,
) -> Numbers:
    """Seconds for a batch of either side, and how many times as fast as the bare calls ours is."""
    model = (ConsistencyModel if calls == 1 else EDMPrecond)(network, 0.002, 80.0, 0.5)
    sampler: Sampler = MultistepConsistency() if calls == 1 else Heun(num_steps=(calls + 1) // 2)
    generator = ImageGenerator(model, spec, sampler, device, graphs=False)
    labels = [i % spec.num_classes for i in range(batches * batch)]
    x = torch.randn(batch, *spec.shape, device=device).contiguous(memory_format=torch.channels_last)
    level = torch.zeros(batch, device=device)
    cond = Condition(label=torch.tensor(labels[:batch], device=device))
    number = batches if calls == 1 else 1

    def bare() -> None:
        for _ in range(number * calls):
            model.network.forward(x, level, cond)

    def ours() -> None:
        generator.generate(number * batch, labels=labels[: number * batch], batch_size=batch)

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16), Replays(model) if graphs else nullcontext():
        found = {name: _each(action, device, count, number) for name, action in (("ours", ours), ("bare", bare))}
    found["images_per_second"] = batch / found["ours"]["seconds"]
    found["ratio"] = found["bare"]["seconds"] / found["ours"]["seconds"]
    return found


def _each(action: Callable[[], None], device: torch.device, count: int, batches: int) -> Numbers:
    found = timed(action, device, 2 if batches > 1 else 1, count)
    return {key: value if key == "count" else value / batches for key, value in found.items()}
