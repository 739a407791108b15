"""Part b: a training step of ADM for ImageNet-64 with EDM, through the trainer and as a plain loop.

The plain loop has the network's dropout and an average too; the trainer also fetches its pictures, draws its noise
from counters, watches for what is not finite, and logs. Model FLOPs of a step are three forward passes' (multiply-
adds of convolutions, linear layers and attention count 2); utilisation is their rate over the card's measured bf16
rate, of part a.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from imagewright.bench.gpu.scale import MadeUp, Scale
from imagewright.bench.gpu.timing import Deadline, Numbers, forget, out_of_memory, peak_bytes, timed
from imagewright.data import Loader
from imagewright.methods.edm import loss_weight
from imagewright.precision import tf32
from imagewright.training.experiment import Assembled, Experiment, assemble
from imagewright.training.footprint import footprint
from imagewright.training.log import Log
from imagewright.training.trainer import Trainer
from imagewright.types import Condition

RECIPE = "edm-imagenet64"
COMPILING = 150.0
"""Seconds that have to be left for a compiled step to be tried: compilation alone takes most of them."""
FEW = 3
"""Repetitions of what is a yardstick alone."""


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """The plain loop in three formats, the trainer eager in both memory formats, and compiled in the faster one.

    A compiled step is left out, and said to be, where less than COMPILING is left.
    """
    sources = MadeUp(scale)
    experiment = scale.experiment(RECIPE)
    with torch.device("meta"):
        shell = assemble(experiment, sources=sources)
    network = cast(nn.Module, shell.parts.roles["denoiser"].module.network)
    flops = footprint(network, shell.images.spec)
    assert flops is not None
    own |= {"recipe": RECIPE, "parameters": sum(p.numel() for p in network.parameters())}
    own["flops_per_image"] = 3 * flops.flops
    rate = parts.get("a", {}).get("bf16", {}).get("flops")
    own["runs"] = runs = {}

    def run(
        name: str, batch: int, step: Callable[[int], AbstractContextManager[Callable[[], object]]], count: int
    ) -> None:
        deadline.check()
        runs[name] = _halving(step, batch, device, scale, min(count, scale.timed))
        if "seconds" in runs[name]:
            images = runs[name]["batch"] / runs[name]["seconds"]
            runs[name]["images_per_second"] = images
            if rate is not None:
                runs[name]["utilisation"] = images * 3 * flops.flops / rate

    for name, rounded, bf16 in (("plain fp32", False, False), ("plain tf32", True, False), ("plain bf16", True, True)):
        with tf32(rounded):
            step = partial(_plain, experiment, sources, device, bf16)
            run(name, scale.batch if bf16 else scale.batch // 4, step, scale.timed if bf16 else FEW)
    with tf32(True):
        ours = partial(_ours, experiment, sources, device)
        run("trainer bf16", scale.batch, partial(ours, {}), scale.timed)
        run("trainer bf16 channels_last", scale.batch, partial(ours, {"channels_last": True}), scale.timed)
        seconds = [runs[name]["seconds"] for name in ("trainer bf16", "trainer bf16 channels_last")]
        own["channels_last"] = last = seconds[1] < seconds[0]
        if deadline.left < COMPILING:
            own["compiled"] = f"left out: a compilation needs up to {COMPILING:.0f} s"
        elif not scale.toy:
            step = partial(ours, {"compile": True, "channels_last": last})
            run("trainer bf16 compiled", scale.batch, step, scale.timed)


def _halving(
    step: Callable[[int], AbstractContextManager[Callable[[], object]]],
    batch: int,
    device: torch.device,
    scale: Scale,
    count: int,
) -> Numbers:
    """Seconds of a step at the largest batch that fits: what does not is halved."""
    while True:
        forget(device)
        try:
            with step(batch) as action:
                found = timed(action, device, scale.warm, count)
                return found | {"batch": batch, "peak_bytes": peak_bytes(device)}
        except RuntimeError as error:
            if not out_of_memory(error) or batch == 1:
                raise
        batch //= 2


def built(experiment: Experiment, sources: MadeUp, device: torch.device) -> Assembled:
    """The experiment's objects, made on the device: networks of 300 M parameters are drawn in no time."""
    with torch.device(device):
        return assemble(experiment, sources=sources)


@contextlib.contextmanager
def _ours(
    experiment: Experiment, sources: MadeUp, device: torch.device, settings: dict[str, Any], batch: int
) -> Iterator[Callable[[], object]]:
    """A step of the trainer, its log included."""
    training = replace(experiment.training, batch=batch, micro_batch=None, precision="bf16", **settings)
    made = built(experiment, sources, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            experiment.method,
            made.parts,
            Loader(made.images, batch, 0),
            training,
            Path(folder) / "checkpoints",
            log=Log(Path(folder)),
            device=device,
        )
        yield trainer.train_step


@contextlib.contextmanager
def _plain(
    experiment: Experiment, sources: MadeUp, device: torch.device, bf16: bool, batch: int
) -> Iterator[Callable[[], object]]:
    """The loop that anybody would write first: ready batches, one network, fused Adam, an average kept by foreach."""
    made = built(experiment, sources, device)
    model = made.parts.roles["denoiser"].module.to(device).train()
    parameters = list(model.parameters())
    average = [copy.deepcopy(p.detach()) for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    shape = (batch, *made.images.spec.shape)
    ready = [
        (torch.rand(shape, device=device) * 2 - 1, torch.randint(made.images.spec.num_classes, (batch,), device=device))
        for _ in range(2)
    ]
    batches = itertools.cycle(ready)

    def step() -> None:
        images, label = next(batches)
        sigma = (torch.randn(batch, device=device) * 1.2 - 1.2).exp()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            error = (model(noised(images, sigma), sigma, Condition(label=label)) - images).square().flatten(1).mean(1)
        torch.autograd.backward((loss_weight(sigma, 0.5) * error).mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-3)

    yield step


def noised(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Images with noise of deviation sigma [N]."""
    return images + sigma[:, None, None, None] * torch.randn_like(images)
