"""`imagewright train RECIPE --dry-run`: everything is built, nothing is computed, and nothing need be there.

Networks are made without memory (torch's meta device), so a run of any size is told in seconds. Images that a recipe
names and this machine lacks are stood in for, and so are teachers, tokenizers and starting weights that have recipes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from imagewright.cli.console import duration, say
from imagewright.data import ImageSet
from imagewright.data.couplings import Couplings
from imagewright.data.negatives import Negatives
from imagewright.data.partition import of_classes
from imagewright.metrics.extractors import SHIPPED
from imagewright.metrics.perceptual import INSTALLED, perceptual_network
from imagewright.metrics.vision import PooledFeatures, VisionFeatures
from imagewright.models.files import ModelFile
from imagewright.networks.recompute import blocks
from imagewright.recipes import RECIPES
from imagewright.training.chain import OF_STAGE
from imagewright.training.distributed import pick_device
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.footprint import model_footprint
from imagewright.training.given import Openable, Sources
from imagewright.training.record import to_json
from imagewright.training.schedule import phases
from imagewright.training.self_play import KeepBest
from imagewright.types import Average, DataSpec, Parts, Trained, UserError

KNOWN_SETS: Mapping[str, tuple[int, int, int]] = {
    "cifar10-32x32.zip": (32, 3, 10),
    "imagenet-32x32": (32, 3, 1000),
    "imagenet-64x64": (64, 3, 1000),
    "imagenet-64x64.zip": (64, 3, 1000),
    "imagenet-224x224.zip": (224, 3, 1000),
    "imagenet-256x256.zip": (256, 3, 1000),
}
"""Resolution, channels and classes of the files that recipes name."""


class StandIns(Sources):
    """Finds what is there, and makes up what is not; `missing` says of what, in words.

    models: what was given for a role.
    """

    def __init__(self, stages: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.missing: list[str] = []
        self.models: dict[str, nn.Module] = {}
        self.stages = stages or {}

    def given(self, role: str, name: str) -> ModelFile:
        """The model of a role, which is kept."""
        file = super().given(role, name)
        self.models[role] = file.model
        return file

    def images(self, data: Any, on_progress: Callable[[int, int], None] | None) -> Any:
        """The images, or an empty set like the one that the recipe names."""
        name = Path(data.source).name
        absent = data.absent()
        if absent is not None:
            self.missing.append(f"examples {data.source}")
            return absent
        if Path(data.source).exists() or name not in KNOWN_SETS:
            return data.open(on_progress)
        side, channels, classes = KNOWN_SETS[name]
        self.missing.append(f"images {data.source}")
        side = data.resolution or side
        spec = DataSpec(
            name=Path(name).stem,
            resolution=side,
            channels=channels,
            num_classes=classes if data.labels else 0,
            class_names=tuple(map(str, range(classes))) if data.labels else (),
        )
        pixels = np.zeros((0, side, side, channels), np.uint8)
        empty = ImageSet(
            spec=spec, pixels=pixels, labels=np.zeros(0, np.int64), names=(), source=data.source, digests=()
        )
        return of_classes(empty, data.classes)

    def model(self, name: str) -> ModelFile:
        """The model, or the product of the recipe of that name, untrained."""
        recipe = Path(name).name
        stage = self.stages.get(name.removeprefix(OF_STAGE)) if name.startswith(OF_STAGE) else None
        if isinstance(stage, KeepBest):
            return self.model(stage.given["run"])
        if stage is not None and not isinstance(stage, Experiment):
            raise UserError(f"{name} is made by {type(stage).__name__}, which a dry run does not do")
        if stage is not None:
            return self._made(stage)
        if Path(name).exists() or recipe not in RECIPES:
            with torch.device("cpu"):
                file = super().model(name)
            return replace(file, model=file.model.to("meta"))
        self.missing.append(f"model {name}: as recipe {recipe} makes it")
        return self._made(RECIPES[recipe]())

    def _made(self, experiment: Experiment) -> ModelFile:
        """What a run would leave."""
        before, self.space = self.space, None  # which is the run's own
        made = assemble(experiment, sources=self)
        self.space = before
        model = made.parts.roles[experiment.method.product].module
        return ModelFile(model=model, spec=made.pictures or made.images.spec, space=made.space)

    def latents(self, images: Any, measure: bool, **settings: Any) -> Any:
        """Images of the latents' shape, as nothing is encoded."""
        assert self.space is not None
        return replace(images, spec=self.space.spec(images.spec))

    def couplings(self, name: str) -> Couplings | None:
        """The pairs, or none."""
        if Path(name).exists():
            store = super().couplings(name)
            assert store is not None
            with suppress(UserError):  # pairs stay when their teacher has gone
                teacher = self.model(str(store.manifest.origin.get("model"))).model
                self.models.setdefault("the pairs' teacher", teacher)
            return store
        self.missing.append(f"couplings {name}")
        return None

    def opened(self, role: str, kind: type[Openable], name: str) -> Any:
        """The thing of a method's own, or None."""
        encoders = VisionFeatures | PooledFeatures
        if issubclass(kind, encoders) and (Path(name).exists() or name in SHIPPED):
            with torch.device("cpu"):
                return super().opened(role, kind, name)
        if Path(name).exists() or not issubclass(kind, Negatives | encoders):
            return super().opened(role, kind, name)
        self.missing.append(f"{role} {name}")
        return _Features(DIMS[kind]) if kind in DIMS else None

    def features(self, name: str | None, spec: DataSpec) -> nn.Module | None:
        """The feature network, or one without parameters in its place."""
        try:
            with torch.device("cpu"):
                network = perceptual_network(name, spec)
            return None if network is None else network.to("meta")
        except UserError as fault:
            if name not in INSTALLED:
                raise
            self.missing.append(f"features {name} ({fault})")
            return nn.Identity()


DIMS: Mapping[type, int] = {VisionFeatures: 1024, PooledFeatures: 512}
"""Of DINOv2's largest but one, whose features VA-VAE's latents are aligned with, and of CLIP ViT-B/32."""


class _Features(nn.Module):
    """In place of an encoder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim


def dry_run(experiment: Experiment, stages: Mapping[str, Any] | None = None) -> None:
    """Print the resolved run, what is missing for it, and what its networks cost. stages: of its chain, by name."""
    sources = StandIns(stages)
    with torch.device("meta"):
        assembled = assemble(experiment, sources=sources)
    spec = assembled.images.spec
    built = experiment if assembled.network is None else replace(experiment, network=assembled.network)
    say(json.dumps(to_json(built), indent=2))
    shape = f"{spec.resolution}x{spec.resolution}x{spec.channels}, {spec.num_classes} classes"
    say(f"data: {assembled.images.source}, {len(assembled.images)} images, {shape}")
    for line in dict.fromkeys(sources.missing):
        say(f"not there: {line}")
    for name, role in assembled.parts.roles.items():
        say(f"{name}: {_cost(role, experiment, spec)}")
    for line in _beside(assembled.parts.roles[experiment.method.product].module, sources.models, spec):
        say(line)
    total = experiment.training.total_images
    say(f"schedule: {total:,} images, rate {experiment.training.optimizer.lr:g}; of them, in images:")
    for name, images in phases(experiment).items():
        say(f"  {name.rpartition('.')[2].removesuffix('_images')}: {images:,.0f} ({_share(images, total)})")
    say(_time(assembled.parts, experiment, spec))


def _share(images: float, total: int) -> str:
    return f"{images / total:.1%} of the run" if images <= total else "longer than the run"


def _beside(product: nn.Module, models: Mapping[str, nn.Module], spec: DataSpec) -> Iterator[str]:
    """What the product is beside the models that the run was given, where its size is another."""
    count, cost = _count(product), model_footprint(product, spec)
    for role, model in models.items():
        theirs, other = _count(model), model_footprint(model, spec)
        if theirs == count or cost is None or other is None:
            continue
        yield (
            f"{role}: {theirs / 1e6:.2f} M parameters, {other.flops / 1e9:.3g} GFLOP an image; what is trained has "
            f"{count / theirs:.0%} of the parameters and {cost.flops / other.flops:.0%} of the operations"
        )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parameters(experiment: Experiment) -> int:
    """Of the part that an experiment exports, with stand-ins for what is not here."""
    with torch.device("meta"):
        made = assemble(experiment, sources=StandIns())
    return _count(made.parts.roles[experiment.method.product].module)


def _time(parts: Parts, experiment: Experiment, spec: DataSpec) -> str:
    """How long the run takes here at the least: each part is asked once an image, and what learns goes backward."""
    operations = 0
    for role in parts.roles.values():
        cost = model_footprint(role.module, spec)
        if cost is not None and not isinstance(role, Average):
            operations += (3 if isinstance(role, Trained) else 1) * cost.flops
    if not operations:
        return "time: not known for these networks"
    device = pick_device("auto")
    speed = operations_per_second(device)
    seconds = operations * experiment.training.total_images / speed
    return (
        f"time: at least {duration(seconds)} on {device} ({speed / 1e9:.0f} GFLOP/s in convolutions), if every "
        "network is asked once an image; methods that ask more often, and small networks, take longer"
    )


def operations_per_second(device: torch.device, seconds: float = 0.3) -> float:
    """Floating-point operations of a 3x3 convolution of 64 channels at 32x32, forward; measured now."""
    layer, x = nn.Conv2d(64, 64, 3, padding=1).to(device), torch.zeros(8, 64, 32, 32, device=device)
    with torch.no_grad():
        layer(x)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            float(layer(x)[0, 0, 0, 0])  # waits for the device
            count += 1
    return count * 2 * 9 * 64 * 64 * 32 * 32 * len(x) / (time.perf_counter() - started)


def _cost(role: Any, experiment: Experiment, spec: DataSpec) -> str:
    count = _count(role.module)
    memory = bytes_per_parameter(role, experiment) * count / 2**20
    line = f"{type(role).__name__.lower()}, {count / 1e6:.2f} M parameters, {memory:.0f} MiB of state"
    training = experiment.training
    if training.parallel == "shard":
        shared = memory * sum(map(_count, blocks(role.module))) / max(count, 1)
        line += f" ({shared:.0f} MiB of them shared out among the processes)"
    cost = model_footprint(role.module, spec, training.precision, recompute=training.recompute)
    if cost is not None:
        line += f"; an image {cost.flops / 1e9:.3g} GFLOP"
        line += f", {cost.activation_bytes / 2**20:.3g} MiB kept for backward" if isinstance(role, Trained) else ""
    return line


def bytes_per_parameter(role: Any, experiment: Experiment) -> int:
    """Weights, their copy in half precision, and for what learns: gradient, moments (Adam has 2, SGD 1), averages."""
    half = 2 if experiment.training.precision != "fp32" else 0
    if not isinstance(role, Trained):
        return 4 + half
    averages = 1 + len(experiment.training.ema.power_std) if role.ema else 0
    moments = 1 if experiment.training.optimizer.kind == "sgd" else 2
    return 4 * (2 + moments + averages) + half
