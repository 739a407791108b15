"""What one update of a product costs: recipes take turns with a reference on the same machine, in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from imagewright.bench.speed import alternate
from imagewright.data import ImageSet, Loader
from imagewright.data.couplings import Couplings
from imagewright.networks import ImageNetwork
from imagewright.training.experiment import Experiment, assemble
from imagewright.training.given import Sources
from imagewright.training.log import Log, Number
from imagewright.training.trainer import Trainer
from imagewright.types import Batch, Coupling, Trained, Update


@dataclass(frozen=True)
class UpdateCost:
    """Seconds of one update of the product, with all that it takes of others; ratios to the reference.

    ratio, low, high: median, least and largest of the paired measurements. passes: median ratio to the same passes
    through its networks alone, forward and where there was a gradient backward, without loss, noise, optimiser and
    average. learning: numbers of parameters that learn. frozen: of those that do not. updates: optimiser steps of every
    part within one update of the product.
    """

    recipe: str
    seconds: float
    ratio: float
    low: float
    high: float
    passes: float
    learning: int
    frozen: int
    updates: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_updates(
    experiments: Mapping[str, Experiment],
    reference: str,
    device: torch.device,
    rounds: int,
    batch: int,
    on_progress: Callable[[str], None] = lambda recipe: None,
) -> list[UpdateCost]:
    """The cost of every recipe, the reference among them.

    Each is in the middle of its run, so that all phases have begun. Couplings are made up: their reading is left out.
    """
    base = Updates(experiments[reference], device, batch)
    costs = []
    for name, experiment in experiments.items():
        on_progress(name)
        other = base if name == reference else Updates(experiment, device, batch)
        rate, _, (median, low, high) = alternate(other, base, device, rounds, batch=1)
        ratio, low, high = 1 / median, 1 / high, 1 / low  # of seconds, where `alternate` has them of speeds
        _, _, (bare, _, _) = alternate(other, other.passes(), device, rounds, batch=1)
        sizes = (other.learning, other.frozen)
        costs.append(UpdateCost(name, 1 / rate, ratio, low, high, 1 / bare, *sizes, dict(other.updates)))
    return costs


class Updates:
    """Calling it trains until the product has been updated once more.

    updates: optimiser steps of every part in such a call. sources: of what the experiment names; couplings are made up.
    """

    def __init__(
        self, experiment: Experiment, device: torch.device, batch: int, sources: Sources | None = None
    ) -> None:
        assembled = assemble(experiment, sources=sources or _WithoutPairs())
        training = replace(experiment.training, batch=batch, micro_batch=None)
        times = getattr(experiment.method, "path_times", ())
        loader = _MadeUpPairs(assembled.images, batch, experiment.data.couplings is not None, times)
        self._log = _Counts()
        self._trainer = Trainer(
            experiment.method,
            assembled.parts,
            cast(Loader, loader),
            training,
            Path(),
            log=self._log,
            device=device,
        )
        self._trainer.images = training.total_images // 2
        self._product = experiment.method.product
        self._modules = [role.module for role in assembled.parts.roles.values()]
        roles = assembled.parts.roles.values()
        sizes = [(isinstance(r, Trained), sum(p.numel() for p in r.module.parameters())) for r in roles]
        self.learning = sum(size for learns, size in sizes if learns)
        self.frozen = sum(size for learns, size in sizes if not learns)
        self()
        self._log.counts.clear()
        self()
        self.updates = Counter(self._log.counts)

    def __call__(self) -> None:
        before = self._log.counts[self._product]
        while self._log.counts[self._product] == before:
            self._trainer.train_step()

    def passes(self) -> Callable[[], None]:
        """The passes of one call alone, on the same inputs."""
        seen: list[_Pass] = []

        def note(network: nn.Module, args: Any) -> None:
            inputs = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)
            learns = any(p.requires_grad for p in network.parameters())
            within = any(isinstance(a, Tensor) and a.requires_grad for a in args)
            seen.append(_Pass(network, inputs, torch.is_grad_enabled() and (learns or within)))

        hooks = [network.register_forward_pre_hook(note) for network in self._networks()]
        self()
        for hook in hooks:
            hook.remove()

        def again() -> None:
            for one in seen:
                one()

        return again

    def _networks(self) -> list[nn.Module]:
        """Networks of images, and what a part without one is."""
        found: list[list[nn.Module]] = [
            [m for m in module.modules() if isinstance(m, ImageNetwork)] or [module] for module in self._modules
        ]
        return list(dict.fromkeys(network for networks in found for network in networks))


@dataclass(frozen=True)
class _Pass:
    """One call of a network, and backwards where it had a gradient."""

    network: nn.Module
    inputs: tuple[Any, ...]
    backwards: bool

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.backwards):
            made = self.network(*self.inputs)
        if self.backwards:
            torch.autograd.backward([each.float().mean() for each in ([made] if isinstance(made, Tensor) else made)])
        self.network.zero_grad(set_to_none=True)


class _Counts(Log):
    """Optimiser steps of every part."""

    def __init__(self) -> None:
        super().__init__(None)
        self.counts: Counter[str] = Counter()

    def add(self, part: str, updates: Sequence[Update], loss: Number, numbers: Mapping[str, Number]) -> None:
        self.counts[part] += 1


class _WithoutPairs(Sources):
    """No store of couplings is looked for."""

    def couplings(self, name: str) -> Couplings | None:
        return None


class _MadeUpPairs:
    """The part of a `Loader` that the trainer asks for; the pairs are noise beside the batch's own images."""

    def __init__(self, images: ImageSet, batch: int, paired: bool, times: Sequence[float] = ()) -> None:
        self._loader, self._paired, self._times = Loader(images, batch, 0), paired, times
        self.image_set = images
        self.follow = self._loader.follow

    def batch(self, position: int, size: int) -> Batch:
        batch: Batch = self._loader.batch(position, size)
        if not self._paired:
            return batch
        images, noise = batch.images, torch.randn_like(batch.images)
        if not self._times:
            return replace(batch, coupling=Coupling(noise, images, batch.cond))
        times = torch.tensor(self._times).expand(len(images), -1)
        t = times[:, :, None, None, None]
        points = (1 - t) * images[:, None] + t * noise[:, None]
        return replace(batch, coupling=Coupling(noise, images, batch.cond, points, times))
