"""Part b: a training step of ADM for ImageNet-64 with EDM, as a plain loop and through the trainer in several ways.

The plain loop has the network's dropout and an average too; the trainer also fetches its pictures, draws its noise
from counters, watches for what is not finite, and logs. Model FLOPs of a step are three forward passes' (multiply-
adds of convolutions, linear layers and attention count 2); utilisation is their rate over the card's measured bf16
rate, of part a. Each way has its own time and its own failures; what the longest kernels of some of them were is
written beside them.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.attention
from torch import nn

from imagewright.bench.gpu import blocks
from imagewright.bench.gpu.scale import MadeUp, Scale
from imagewright.bench.gpu.timing import (
    Deadline,
    Numbers,
    aside,
    forget,
    kernels,
    out_of_memory,
    peak_bytes,
    timed,
)
from imagewright.data import Loader
from imagewright.methods.edm import loss_weight
from imagewright.precision import tf32
from imagewright.training.experiment import Assembled, Experiment, assemble
from imagewright.training.footprint import footprint
from imagewright.training.log import Log
from imagewright.training.trainer import Trainer
from imagewright.types import Condition

RECIPE = "edm-imagenet64"
FEW = 3
"""Repetitions of what is measured beside a step."""
MOST = 45.0
"""Seconds for one way."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train.

    share: of the scale's batch. training: settings that differ. benchmark: whether cuDNN tries its kernels. attention:
    a backend of torch that comes first. profiled: whether the longest kernels are written down.
    """

    name: str
    share: float = 1.0
    training: Mapping[str, Any] = field(default_factory=dict)
    benchmark: bool = False
    attention: str | None = None
    profiled: bool = False


LAST: Mapping[str, Any] = {"channels_last": True, "graphs": False}
WAYS = (  # recordings last: one that goes wrong could take the device with it
    Way(name="trainer bf16 channels_last", training=LAST, profiled=True),
    Way(name="cudnn benchmark", training=LAST, benchmark=True, profiled=True),
    Way(name="cudnn attention", training=LAST, benchmark=True, attention="CUDNN_ATTENTION"),
    Way(name="twice the batch", share=2, training=LAST, benchmark=True),
    Way(name="an eighth of the batch", share=1 / 8, training=LAST),
    Way(name="graphs", training={**LAST, "graphs": True}, benchmark=True, profiled=True),
    Way(name="an eighth of the batch, graphs", share=1 / 8, training={**LAST, "graphs": True}),
)


def measure(own: Numbers, parts: Numbers, scale: Scale, device: torch.device, deadline: Deadline, folder: Path) -> None:
    """The plain loop, the ways above, what of a step is the optimiser's, and single blocks, eager and compiled."""
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
    runs: Numbers = {}
    own["runs"] = runs

    def rated(found: Numbers) -> None:
        images = found["batch"] / found["seconds"]
        found["images_per_second"] = images
        if rate is not None:
            found["utilisation"] = images * 3 * flops.flops / rate

    with tf32(True):
        with aside(runs, "plain bf16", deadline, scale.most(MOST)) as found:
            found |= _halving(partial(_plain, experiment, sources, device), scale.batch, device, scale, scale.timed)
            rated(found)
        own["blocks"] = {}
        blocks.measure(own["blocks"], scale, device, deadline)
        for way in WAYS if not scale.toy else WAYS[:1]:
            with aside(runs, way.name, deadline, scale.most(MOST)) as found, _as_told(way, device):
                step = partial(_ours, experiment, sources, device, way.training, found)
                longest = found.setdefault("kernels", {}) if way.profiled else None
                batch = max(int(way.share * scale.batch), 1)
                found |= _halving(step, batch, device, scale, scale.timed, longest)
                rated(found)


@contextlib.contextmanager
def _as_told(way: Way, device: torch.device) -> Iterator[None]:
    """torch's own settings of a way."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, way.benchmark and device.type == "cuda"
    kinds = torch.nn.attention.SDPBackend
    order = [kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.MATH]
    first = [getattr(kinds, way.attention)] if way.attention else []
    try:
        with torch.nn.attention.sdpa_kernel([*first, *order], set_priority=True) if first else contextlib.nullcontext():
            yield
    finally:
        cudnn.benchmark = before


def _halving(
    step: Callable[[int], AbstractContextManager[Callable[[], object]]],
    batch: int,
    device: torch.device,
    scale: Scale,
    count: int,
    longest: Numbers | None = None,
) -> Numbers:
    """Seconds of a step at the largest batch that fits: what does not is halved. longest: gets the longest kernels."""
    while True:
        forget(device)
        try:
            with step(batch) as action:
                found = timed(action, device, scale.warm, count) | {"batch": batch, "peak_bytes": peak_bytes(device)}
                if longest is not None:
                    longest |= kernels(action, device)
                return found
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
    experiment: Experiment,
    sources: MadeUp,
    device: torch.device,
    settings: Mapping[str, Any],
    found: Numbers,
    batch: int,
) -> Iterator[Callable[[], object]]:
    """A step of the trainer, its log included; why it is not recorded, where it was to be, is noted."""
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
        if trainer.graphs is not None:
            found["recorded"] = trainer.graphs.why_not or True
        found["learner"] = _learner(trainer, device)


def _learner(trainer: Trainer, device: torch.device) -> Numbers:
    """Seconds of what comes after the passes: the gradient's norm, the optimiser and averages."""
    (learner,) = trainer.learners.values()

    def update() -> None:
        for parameter in learner.parameters:
            parameter.grad = torch.zeros_like(parameter)
        learner.gradient()
        learner.step(trainer.images + trainer.config.batch)

    return timed(update, device, 1, FEW)


@contextlib.contextmanager
def _plain(experiment: Experiment, sources: MadeUp, device: torch.device, batch: int) -> Iterator[Callable[[], object]]:
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
        with torch.autocast(device.type, torch.bfloat16):
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
