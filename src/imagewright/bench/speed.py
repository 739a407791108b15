"""Speed as ratios within one process: ours and a peer take turns, so that the machine's drift falls on both."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagewright.data import ImageSet, Loader
from imagewright.methods.continuous_consistency import ContinuousConsistencyDistillation, tangent, trig_output
from imagewright.methods.dsno import OperatorDistillation
from imagewright.methods.edm import EDM
from imagewright.models.consistency import ConsistencyModel, ContinuousConsistencyModel
from imagewright.models.operator import TrajectoryOperator
from imagewright.models.preconditioning import EDMPrecond
from imagewright.networks import SongUNet, SongUNetConfig
from imagewright.samplers import MultistepConsistency
from imagewright.samplers.generator import ImageGenerator
from imagewright.training.config import TrainingConfig
from imagewright.training.trainer import Trainer
from imagewright.types import UNCONDITIONAL, Condition, DataSpec, Method, Parts

BATCH = 64
RESOLUTION = 32
WIDTHS = (32, 64, 128)
"""Channels per level of both networks."""
SPEC = DataSpec(name="speed", resolution=RESOLUTION, channels=3)


@dataclass(frozen=True)
class Ratio:
    """Images per second of ours and of the peer (medians), and the median, least and largest paired ratio.

    details: further numbers, such as network calls.
    """

    what: str
    ours: float
    peer: str
    theirs: float | None
    ratio: float
    low: float
    high: float
    details: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_sampling(device: torch.device, rounds: int) -> Ratio:
    """`ImageGenerator.generate` with one network call against calling the bare network on ready latents."""
    spec = DataSpec(name="speed", resolution=RESOLUTION, channels=3, num_classes=10)
    model = ConsistencyModel(network(10), 0.002, 80.0, 0.5).eval().to(device)
    generator = ImageGenerator(model, spec, MultistepConsistency(), device)
    labels = [i % 10 for i in range(BATCH)]
    x = torch.randn(BATCH, *spec.shape, device=device)
    noise_label = torch.zeros(BATCH, device=device)
    cond = Condition(label=torch.tensor(labels, device=device))

    @torch.no_grad()
    def bare() -> None:
        model.network(x, noise_label, cond)

    ours, theirs, ratios = alternate(
        lambda: generator.generate(BATCH, labels=labels, batch_size=BATCH), bare, device, rounds
    )
    return Ratio("one-step sampling", ours, "bare network in a loop", theirs, *ratios)


def measure_training(device: torch.device, rounds: int) -> list[Ratio]:
    """A step of the trainer with EDM on SongUNet, its loader, noise and average included, against forward, backward and
    Adam on diffusers' UNet2DModel of the same widths, attention at 8.
    """
    ours = _trained(EDM(), EDM().parts(network=network(0), spec=SPEC), device)
    try:
        from diffusers import UNet2DModel
    except ImportError:
        rate = BATCH / statistics.median(seconds(ours, device) for _ in range(rounds))
        return [Ratio("training step", rate, "diffusers.UNet2DModel", None, 0.0, 0.0, 0.0)]
    peer = UNet2DModel(
        sample_size=RESOLUTION,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(device)
    theirs = _bare_step(peer, device, lambda net, x, t: net(x, t).sample)
    mine, other, ratios = alternate(ours, theirs, device, rounds)
    return [Ratio("training step", mine, "diffusers.UNet2DModel", other, *ratios)]


def measure_loop(device: torch.device, rounds: int) -> Ratio:
    """The same step of the trainer against a bare loop over the same network: what the loop itself costs."""
    ours = _trained(EDM(), EDM().parts(network=network(0), spec=SPEC), device)
    bare = _bare_step(EDMPrecond(network(0)).to(device), device, lambda net, x, t: net(x, t + 0.1))
    mine, theirs, ratios = alternate(ours, bare, device, rounds)
    return Ratio("training step", mine, "a bare loop over the same network", theirs, *ratios)


def measure_tangent(device: torch.device, rounds: int) -> Ratio:
    """The tangent of `methods.continuous_consistency` (one Jacobian-vector product) against a forward pass.

    details: what a step of sCD with it costs, in steps of EDM on the same network.
    """
    model = ContinuousConsistencyModel(network(0)).to(device)
    x, velocity = (torch.randn(BATCH, 3, RESOLUTION, RESOLUTION, device=device) for _ in range(2))
    t = torch.linspace(0.1, 1.5, BATCH, device=device)

    @torch.no_grad()
    def plain() -> None:
        trig_output(model, x, t, UNCONDITIONAL)

    @torch.no_grad()
    def with_tangent() -> None:
        tangent(model, x, t, velocity, UNCONDITIONAL, 1.0)

    ours, theirs, ratios = alternate(with_tangent, plain, device, rounds)
    scd = ContinuousConsistencyDistillation()
    distilled = _trained(scd, scd.parts(teacher=EDMPrecond(network(0)), spec=SPEC), device)
    learnt = _trained(EDM(), EDM().parts(network=network(0), spec=SPEC), device)
    _, _, (steps, _, _) = alternate(distilled, learnt, device, max(rounds // 3, 1))
    details = {"forward passes": 1 / ratios[0], "steps of EDM that a step of sCD costs": 1 / steps}
    return Ratio("sCM's tangent", ours, "a forward pass", theirs, *ratios, details=details)


def measure_trajectory(device: torch.device, rounds: int) -> Ratio:
    """DSNO's one call for four points of a trajectory against a single call of the network inside.

    details: what its call takes in single calls, by the clock and by the memory that is in use at most beside weights.
    """
    levels = OperatorDistillation().levels
    model = TrajectoryOperator(network(0), levels=levels).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, label = torch.randn(BATCH // 4, 3, RESOLUTION, RESOLUTION, device=device), torch.zeros(BATCH // 4, device=device)
    x = x.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def whole() -> None:
        model.trajectory(x)

    @torch.no_grad()
    def single() -> None:
        model.network(x, label)

    ours, theirs, ratios = alternate(whole, single, device, rounds, BATCH // 4)
    memory = peak_bytes(whole, device) / peak_bytes(single, device)
    details = {"single calls by the clock": 1 / ratios[0], "by memory": memory}
    return Ratio("DSNO's call, four points", ours, "a single call of its network", theirs, *ratios, details=details)


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most memory that an action has in use at once, beyond what was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _InUse() as memory:
        action()
    return int(memory.most)


class _InUse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that were made while it is on, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, memory: torch.UntypedStorage) -> None:
        size, key = memory.nbytes(), memory._cdata
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(memory, gone)


def _trained(method: Method, parts: Parts, device: torch.device) -> Callable[[], object]:
    """A step of the trainer, on made-up pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (2 * BATCH, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    training = TrainingConfig(total_images=1_000 * BATCH, batch=BATCH)
    return Trainer(method, parts, Loader(ImageSet.of(pixels), BATCH, 0), training, Path(), device=device).train_step


def network(classes: int) -> SongUNet:
    """Untrained, of 32x32 images."""
    return SongUNet(
        SongUNetConfig(
            img_resolution=RESOLUTION,
            in_channels=3,
            out_channels=3,
            label_dim=classes,
            model_channels=WIDTHS[0],
            channel_mult=tuple(w // WIDTHS[0] for w in WIDTHS),
            num_blocks=2,
            attn_resolutions=(8,),
            dropout=0.0,
        )
    )


def _bare_step(
    module: torch.nn.Module, device: torch.device, call: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters())
    x = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION, device=device)
    t = torch.linspace(0, 1, BATCH, device=device)

    def step() -> None:
        torch.autograd.backward(call(module, x, t).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def alternate(
    a: Callable[[], object],
    b: Callable[[], object],
    device: torch.device,
    rounds: int,
    batch: int = BATCH,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, tuple[float, float, float]]:
    """Median images/s of a and b, and median, least and largest ratio of their speeds, pair by pair."""
    a(), b()
    pairs = [(seconds(a, device, clock), seconds(b, device, clock)) for _ in range(rounds)]
    ratios = [theirs / ours for ours, theirs in pairs]
    return (
        batch / statistics.median(p[0] for p in pairs),
        batch / statistics.median(p[1] for p in pairs),
        (statistics.median(ratios), min(ratios), max(ratios)),
    )


def seconds(
    action: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """How long it takes, the device's work included."""
    started = clock()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def own_clock(device: torch.device) -> Callable[[], float]:
    """Of work that waits for nothing: the process's own time on one CPU thread, in which nobody else's falls."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter
