"""A run, complete: what is trained, on what, how. Frozen, JSON-able, and enough to repeat it.

`assemble` turns an `Experiment` into objects; `run_experiment` trains it in a run directory:

    experiment.json                     resolved configuration, command, versions, seed
    model.safetensors, model.json       the product's averaged weights, self-describing; a copy of the description
    checkpoints/                        full training state
    log.jsonl, events.out.tfevents.*    numbers over time (the second, and others, by `training.trackers`)
    samples/                            a grid per snapshot, from fixed seeds
    metrics.json, report.html           written by `evaluate` and `report`
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagewright.data import ImageSet, Loader
from imagewright.data.couplings import Couplings, Mixture
from imagewright.data.curation.labelled import BalancedSet
from imagewright.data.source import DataSource
from imagewright.files import try_output, write_json
from imagewright.models.files import ModelFile, save_model
from imagewright.models.kinds import KINDS, words
from imagewright.models.latents import LatentSpace
from imagewright.models.tokens import check_device
from imagewright.networks import NETWORKS
from imagewright.noise import derive_seed
from imagewright.samplers.generator import ImageGenerator, sampler_to_json
from imagewright.training.checkpoint import newest
from imagewright.training.config import TrainingConfig, in_images
from imagewright.training.distributed import Processes
from imagewright.training.given import (
    SPACE,
    Given,
    Sources,
    check_examples,
    gather,
    named,
    requests,
    require_asked,
    sizes_of,
)
from imagewright.training.locking import require_there, sole_trainer
from imagewright.training.log import Log
from imagewright.training.pairing import pairs_of
from imagewright.training.reconstructions import reconstruction_record, save_reconstructions
from imagewright.training.record import (
    Inputs,
    begun_as,
    check_inputs,
    claim,
    experiment_record,
    how_computed,
    identity,
    located,
)
from imagewright.training.snapshots import save_grid, snapshot_path
from imagewright.training.starting import start_from
from imagewright.training.trainer import Progress, Trainer
from imagewright.types import DataSpec, Examples, Offering, Parts, UserError, an, kind_of
from imagewright.version import __version__


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run. The fields typed Any hold dataclasses: a method, a network's configuration, a sampler."""

    data: Any
    """Where the examples come from: a kind of `data.source.DataSource`."""
    method: Any
    """What is trained and how: a dataclass of `imagewright.methods`."""
    network: Any = None
    """Configuration of the network; resolution, channels and classes are taken from the data, the
    length of augmentation labels from a method that augments."""
    given: Given = field(default_factory=dict)
    """Where the things lie that the method asks for (`training.given`), by their names: "teacher", a run folder, model
    folder or shipped model; "tokenizer", whose tokens it learns (without one, the images' own 8-bit values);
    "features", what a perceptual distance compares by: "digits" or "emoji" (shipped classifiers), an encoder's run,
    file or folder, or "lpips" (VGG, where that package and its weights are installed), without one the data set's own
    classifier; and others."""
    start: str | None = None
    """Run or model whose weights the trained product starts from: fine-tuning; None = those that the method sets.
    Other trained parts start from those of the same name in the run's last checkpoint, where it has them."""
    sampler: Any = None
    """Sampler of the snapshots, saved with the model as its default; None = the kind's own."""
    training: TrainingConfig

    def __post_init__(self) -> None:
        if not isinstance(self.data, DataSource):
            raise UserError(f"data is {type(self.data).__name__}, which is no data to train")
        if not all(hasattr(self.method, member) for member in ("parts", "step", "product")):
            raise UserError(f"method is {type(self.method).__name__}, which is no method to train")
        if self.sampler is not None and not hasattr(self.sampler, "model_kind"):
            raise UserError(f"sampler is {type(self.sampler).__name__}, which is none")
        object.__setattr__(self, "given", named(**self.given))

    def giving(self, **given: str | tuple[str, ...] | None) -> Experiment:
        """The same run with other things given; None = without it."""
        return dataclasses.replace(self, given=named(**{**self.given, **given}))

    def in_images(self) -> Experiment:
        """The same with every share of the run, of its training and of its method, as a number of images."""
        total = self.training.total_images
        method = in_images(self.method, total) if dataclasses.is_dataclass(self.method) else self.method
        return dataclasses.replace(self, training=self.training.in_images(), method=method)


@dataclass(frozen=True)
class Assembled:
    """An experiment's objects."""

    images: Any
    """The data set (`types.Examples`)."""
    parts: Parts
    couplings: Couplings | Mixture | None = None
    inputs: Inputs = field(default_factory=dict)
    """What identifies each thing that the run was given."""
    network: Any = None
    """Configuration of the network that was built, with what the data and the method decide; None = it has none."""
    space: LatentSpace | None = None
    """The latents in which the run is; None = it is on images."""
    pictures: DataSpec | None = None
    """What the run's images are, where it is in latents of them."""


def assemble(
    experiment: Experiment,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    sources: Sources | None = None,
) -> Assembled:
    """Open the data, build the networks, load the teacher. Raises UserError where they do not fit together."""
    sources = sources or Sources()
    pictures = sources.images(experiment.data, on_progress)
    images = _in_latents(experiment, pictures, sources, on_progress)
    spec, method = dataclasses.replace(images.spec, empty_classes=images.empty_classes), experiment.method
    check_examples(method, images)
    wanted = inspect.signature(method.parts).parameters
    offers = images.offers if isinstance(images, Offering) else {}
    given = {"spec": spec, **offers, **gather(method, experiment.given, spec, sources)}
    pairs = experiment.data.couplings
    if "couplings" in wanted:
        given["couplings"] = pairs is not None
    elif pairs is not None:
        raise UserError(f"method {type(method).__name__} learns from no pairs; data.couplings has no effect")
    config = None
    if "network" in wanted and (experiment.network is not None or wanted["network"].default is inspect.Parameter.empty):
        config = _network_config(experiment, spec, {**sizes_of(given), **_sizes_by(method, given)})
        given["network"] = _network(config, experiment.training.seed)
    missing = [n for n, p in wanted.items() if n not in given and p.default is inspect.Parameter.empty]
    if missing:
        raise UserError(f"method {type(experiment.method).__name__} needs {', '.join(missing)}, which no field gives")
    with torch.random.fork_rng(devices=[]):  # some methods make networks of their own
        torch.manual_seed(derive_seed(experiment.training.seed, 1))
        parts = experiment.method.parts(**{n: v for n, v in given.items() if n in wanted})
    if sources.space is not None:
        _check_in_latents(method, parts)
    if experiment.start is not None:
        start_from(experiment.start, sources.given("start", experiment.start).model, parts, experiment.method.product)
    store = None
    if pairs is not None:
        store = pairs_of(pairs, experiment.data.coupling_weights, spec, experiment.given.get("teacher"), sources)
    inputs: Inputs = {"data": _identity(images), **sources.inputs}
    of_latents = None if sources.space is None else pictures.spec
    return Assembled(images, parts, store, inputs, config, sources.space, of_latents)


def _in_latents(experiment: Experiment, images: Any, sources: Sources, on_progress: Any) -> Any:
    """The images, or the latents of them where the run is given an autoencoder. Raises UserError for one of others."""
    name, data = experiment.given.get(SPACE.name), experiment.data
    folder, scale = data.latents, data.latent_std
    if not isinstance(name, str) or SPACE.name in requests(experiment.method):
        for field_name, idle in (("latents", folder is None), ("latent_std", scale == 0.5)):
            if not idle:
                raise UserError(f"data.{field_name} has no effect without --autoencoder RUN")
        return images
    require_asked(experiment.method, experiment.given)
    if not isinstance(images, ImageSet):
        raise UserError(f"autoencoder {name} takes images; {images.source} holds others")
    if isinstance(images, BalancedSet):
        raise UserError("data.balance is not for latents; write a balanced set with `imagewright data balance`")
    file = sources.enter(name, scale)
    ours, theirs = ((s.resolution, s.channels) for s in (images.spec, file.spec))
    if ours != theirs:
        raise UserError(f"autoencoder {name} takes images of resolution and channels {theirs}; the data have {ours}")
    if file.space is not None and scale not in (0.5, file.space.scale):
        raise UserError(f"data.latent_std is {scale:g}; the latents of {name} are brought to {file.space.scale:g}")
    return sources.latents(images, file.space is None, mirrored=data.xflip, folder=folder, on_progress=on_progress)


def _check_in_latents(method: Any, parts: Parts) -> None:
    """Raise UserError for methods that make no model which could live in latents, or that change pictures."""
    kind = kind_of(parts.roles[method.product].module)
    if kind not in ("denoiser", "flow_map"):
        raise UserError(
            f"method {type(method).__name__} makes {an(words(kind))}, which sees images; autoencoder has no effect on "
            "it"
        )
    if getattr(method, "augment_dim", 0):
        raise UserError("method.augment changes pictures, and this run is on latents; leave one of the two out")
    if getattr(method, "self_conditioning", False):
        raise UserError(
            "method.self_conditioning clips estimates to the range of pictures, and this run is on latents, which have "
            "none; leave one of the two out"
        )


def _identity(images: Examples) -> dict[str, Any]:
    """What identifies images: how many, of what shape and classes, and the fingerprint of all of it."""
    spec = images.spec
    shape = f"{spec.resolution}x{spec.resolution}x{spec.channels}"
    return {"images": len(images), "shape": shape, "classes": spec.num_classes, "fingerprint": images.fingerprint}


def _sizes_by(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a method itself says of its network's sizes, from what it is given, by name, as `parts` is."""
    if not hasattr(method, "sizes"):
        return {}
    wanted = inspect.signature(method.sizes).parameters
    sizes: dict[str, Any] = method.sizes(**{name: given[name] for name in wanted})
    return sizes


def _network_config(experiment: Experiment, spec: DataSpec, sizes: Mapping[str, Any]) -> Any:
    """The network's configuration, of which as much as it has a field for comes from the data."""
    if experiment.network is None:
        raise UserError(f"method {type(experiment.method).__name__} needs a network; give one with `network`")
    known: dict[str, Any] = {
        "img_resolution": spec.resolution,
        "in_channels": spec.channels,
        "out_channels": spec.channels,
        "label_dim": spec.num_classes,
        **({"num_classes": spec.num_classes} if spec.num_classes else {}),
    }
    if hasattr(experiment.method, "augment_dim"):
        known["augment_dim"] = experiment.method.augment_dim
    known |= sizes
    if _name_of(experiment.network) not in NETWORKS:
        raise UserError(f"network is {type(experiment.network).__name__}, which configures none")
    fields = {f.name for f in dataclasses.fields(experiment.network)}
    return dataclasses.replace(experiment.network, **{k: v for k, v in known.items() if k in fields})


def _network(config: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, 0))
        return NETWORKS[_name_of(config)](config)


def _name_of(config: Any) -> str:
    return type(config).__name__.removesuffix("Config")


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    command: list[str] | None = None,
    processes: Processes | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_open: Callable[[int, int], None] | None = None,
) -> Path:
    """Train, and leave a run directory that explains itself. Returns the folder.

    resume: go on from the newest checkpoint in the folder (from the start if there is none yet).
    Raises UserError when the folder holds another run, is in use, or the experiment's parts do not fit.
    """
    processes = processes or Processes()
    try_output(folder)
    with sole_trainer(folder, processes):
        return _run(experiment, folder, device, resume, command, processes, on_progress, on_open)


def _require_ahead(folder: Path, training: TrainingConfig) -> None:
    """Raise UserError where a run that goes on is past its end, and not by the rest of a batch."""
    seen = newest(folder / "checkpoints") or 0
    if seen - training.batch >= training.total_images:
        raise UserError(
            f"{folder} has seen {seen:,} images already; training.total_images is {training.total_images:,}, which "
            "takes none of them back"
        )


def _run(
    experiment: Experiment,
    folder: Path,
    device: torch.device | str,
    resume: bool,
    command: list[str] | None,
    processes: Processes,
    on_progress: Callable[[Progress], None],
    on_open: Callable[[int, int], None] | None,
) -> Path:
    experiment = located(experiment, folder).in_images()
    before, begun = claim(folder, experiment, resume), begun_as(folder)
    _require_ahead(folder, experiment.training)
    processes.wait()  # or a slow process would find the record of this very run in the folder
    assembled = assemble(experiment, on_open, sources=Sources(device))
    check_inputs(folder, before, assembled.inputs, experiment)
    check_device(assembled.parts.roles[experiment.method.product].module, device)
    if processes.is_first:
        computed = how_computed(processes.world, device, experiment.training.precision)
        record = experiment_record(experiment, command, folder, assembled.inputs, before, computed, begun)
        write_json(folder / "experiment.json", record)
    loader = Loader(
        assembled.images,
        experiment.training.batch,
        experiment.training.seed,
        experiment.data.xflip,
        assembled.couplings,
        experiment.data.workers,
    )
    log = Log(folder if processes.is_first else None, experiment.training.trackers)

    def noted(progress: Progress) -> None:
        if processes.is_first:
            require_there(folder)
        on_progress(progress)

    trainer = Trainer(
        experiment.method,
        assembled.parts,
        loader,
        experiment.training,
        folder / "checkpoints",
        log=log,
        device=device,
        processes=processes,
        run=begun or identity(experiment, assembled.inputs),
        on_snapshot=lambda images: snapshot(True),
        on_stop=lambda images: snapshot(False),
        on_progress=noted,
    )

    def snapshot(picture: bool) -> None:
        product = trainer.product()
        if product is not None:
            require_there(folder)
            export(experiment, trainer, product, assembled, folder, torch.device(device), picture=picture)
            log.picture(folder / "samples" / f"{trainer.images:012d}.png", trainer.images)

    if resume:
        trainer.resume()
    trainer.train()
    snapshot(True)
    log.close()
    return folder


def export(
    experiment: Experiment,
    trainer: Trainer,
    model: nn.Module,
    assembled: Assembled,
    folder: Path,
    device: torch.device,
    *,
    picture: bool = True,
) -> None:
    """Write the product's averaged weights as a model, and a snapshot: samples, or what is given back of pictures."""
    space, images = assembled.space, assembled.images
    images = images if space is None else images.pictures
    spec = dataclasses.replace(images.spec, empty_classes=images.empty_classes)
    origin: dict[str, Any] = {
        "teacher": None,
        "tokenizer": None,
        **experiment.given,
        "method": type(experiment.method).__name__,
        "images_seen": trainer.images,
        "weights": "average" if trainer.learners[experiment.method.product].averages else "raw",
        "seed": experiment.training.seed,
        "imagewright": __version__,
    }
    snapshot = snapshot_path(folder, trainer.images)
    kind = kind_of(model)
    if KINDS[kind].answers:
        origin |= {} if kind == "encoder" else reconstruction_record(model, images, device)
        save_model(folder, ModelFile(model=model, spec=spec, origin=origin))
        if picture and kind != "encoder":
            save_reconstructions(snapshot, model, images, device)
        return
    generator = ImageGenerator(model, spec, experiment.sampler, device, space=space)
    way = sampler_to_json(generator.sampler)
    save_model(folder, ModelFile(model=model, spec=spec, sampler=way, origin=origin, space=space))
    if picture:
        save_grid(snapshot, generator)
