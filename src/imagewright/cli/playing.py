"""What `imagewright play` shows, without its page: models that draw the same view, timed, and looked at closely."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
import numpy.typing as npt
import torch

from imagewright.checks import require_number, require_whole
from imagewright.cli.edit import fill_in
from imagewright.cli.edit_tokens import at_own_size, check_model
from imagewright.cli.sampling import Changes, make_generator
from imagewright.cli.scoring import real_images
from imagewright.data.image_set import ImageSet
from imagewright.metrics.memorisation import nearest
from imagewright.models.files import ModelFile
from imagewright.models.weighted import takes_weight
from imagewright.noise import ImageNoise
from imagewright.pretrained import find_model
from imagewright.samplers import PRESETS, SAMPLERS
from imagewright.samplers.editing import between
from imagewright.samplers.generator import ImageGenerator, sampler_to_json
from imagewright.types import DataSpec, UserError, kind_of

Images = npt.NDArray[np.uint8]
MOST = 64
"""Pictures of a model on the page."""
MOST_STEPS = 1000
FRAMES = 9
"""Pictures on the way from one seed to another."""
CELLS = 8
"""Rows and columns of a picture in which a part to be filled in is chosen."""
NEAREST = 5
MOST_REAL = 20_000
"""Training pictures that a sample is compared with, evenly chosen of more."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What all models are asked to draw; every field is a parameter of the link. None = each model's own.

    Raises UserError for a number out of its bounds.
    """

    seed: int = 0
    n: int = 4
    """Pictures of each model."""
    label: int | None = None
    """Class of all; -1 = none; None = drawn for each picture."""
    sampler: str | None = None
    steps: int | None = None
    settings: str = ""
    """Further settings of the sampler, name=value, with spaces between."""
    weight: float | None = None
    """Strength of the guidance, as each kind of model takes it."""
    low: float | None = None
    """Least noise level at which denoisers are guided."""
    high: float | None = None
    towards: int | None = None
    """Seed at the other end of the interpolation; None = none is drawn."""

    def __post_init__(self) -> None:
        require_whole("n", self.n, 1, MOST)
        for name, least in (("seed", 0), ("towards", 0), ("steps", 1), ("label", -1)):
            value = getattr(self, name)
            if value is not None:
                require_whole(name, value, least, MOST_STEPS if name == "steps" else 2**63 - 1)
        if self.sampler is not None and self.sampler not in (*SAMPLERS, *PRESETS):  # no file that a link names
            raise UserError(f"there is no sampler {self.sampler!r}; there are {', '.join([*SAMPLERS, *PRESETS])}")
        for name in ("weight", "low", "high"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), -1e6, 1e6)

    @property
    def query(self) -> str:
        """What differs from the defaults, as a link's parameters: "seed=7&steps=9"."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        given = {name: value for name, value in named.items() if value != getattr(View, name)}
        return urlencode({k: f"{v:g}" if isinstance(v, float) else v for k, v in given.items()})

    @classmethod
    def of_query(cls, query: str) -> View:
        """Inverse of `query`. Raises UserError for a parameter that is unknown or no number."""
        kinds = {f.name: str if "str" in str(f.type) else float if "float" in str(f.type) else int for f in fields(cls)}
        found: dict[str, str | float] = {}
        for name, text in parse_qsl(query):
            if name not in kinds:
                raise UserError(f"the link has a parameter {name!r}; known are {', '.join(kinds)}")
            try:
                found[name] = kinds[name](text)
            except ValueError:
                raise UserError(f"the link's {name} is {text!r}, which is no number") from None
        return cls(**found)  # type: ignore[arg-type]  # each made by its field's kind


@dataclass(frozen=True)
class Drawn:
    """One model's pictures of a view.

    images: uint8 [n, H, W, C]. labels: their classes' names, or (). seconds: that the batch took. nfe: network calls a
    picture. sampler: its name and settings.
    """

    images: Images
    labels: tuple[str, ...]
    seconds: float
    nfe: int
    sampler: Mapping[str, object]


@dataclass(frozen=True)
class Near:
    """The training pictures nearest to one, nearest first: uint8 [k, H, W, C], their distances in pixels, indices.

    of: how many were compared.
    """

    images: Images
    distances: tuple[float, ...]
    indices: tuple[int, ...]
    of: int


class Player:
    """Models that draw in turn. One call at a time, from whatever thread, so that the seconds are a model's own.

    data: training pictures; None = what each model's run says. guide: what denoisers are guided away from; None = their
    own unlabelled answer. Raises UserError where a model is not found, or twice, or the guide fits none.
    """

    def __init__(
        self, names: Sequence[str], device: str = "auto", data: str | None = None, guide: str | None = None
    ) -> None:
        if len({*names}) < len(names):
            raise UserError("a model is named twice; each is drawn once")
        self.files: dict[str, ModelFile] = {name: find_model(name) for name in names}
        self._device, self._data, self._guide = device, data, guide
        if guide is not None and not any(_takes_guide(file) for file in self.files.values()):
            raise UserError(f"--guide {guide} has no effect: no model here is guided by another")
        self._lock = threading.Lock()
        self._warm: set[str] = set()
        self._real: dict[str, ImageSet] = {}
        for name in names:
            told = guide is not None and _takes_guide(self.files[name])
            self._generator(name, View(weight=1.5 if told else None))  # what draws no pictures is told now

    def classes(self) -> tuple[str, ...]:
        """Names of the classes to choose from: those of the model that has most."""
        return max((_names(file.spec) for file in self.files.values()), key=len)

    def samplers(self) -> list[str]:
        """Those that some model here can be drawn with."""
        kinds = {kind_of(file.model).replace("latent_denoiser", "denoiser") for file in self.files.values()}
        known: list[tuple[str, Any]] = [*SAMPLERS.items(), *PRESETS.items()]
        return [name for name, sampler in known if sampler.model_kind in kinds]

    def draw(self, name: str, view: View) -> Drawn:
        """The view's pictures by one model. Raises UserError for what the model, or its sampler, does not take."""
        with self._lock:
            generator = self._generator(name, view)
            labels = self._labels(generator, view, view.n)
            if name not in self._warm:  # the first call finds its memory and its kernels
                generator.at([0], labels=None if labels is None else labels[:1], seed=view.seed)
                self._warm.add(name)
            began = time.perf_counter()
            images = generator.at(range(view.n), labels=labels, seed=view.seed)
            seconds = time.perf_counter() - began
            names = [*_names(generator.spec), "no class"]  # -1 is the last
            shown = () if labels is None else tuple(names[i] for i in labels)
            return Drawn(images, shown, seconds, generator.nfe, sampler_to_json(generator.sampler))

    def way(self, name: str, view: View, i: int) -> Images:
        """Picture i of the view from noise to image, as a strip uint8 [H', W', C]."""
        from imagewright.report.figures import trajectory_picture  # matplotlib, which pictures do without

        with self._lock:
            generator = self._generator(name, view)
            labels = self._labels(generator, view, view.n)
            chosen = None if labels is None else [labels[i]]
            return trajectory_picture(generator, seed=view.seed, labels=chosen, n=1, first=i)

    def between(self, name: str, view: View) -> Images:
        """From picture 0 of the view's seed to that of `towards`, through the noises between: uint8 [FRAMES, H, W, C].

        All are of the first one's class, and what a sampler draws on its way is the first one's. Raises UserError
        where there is no `towards`, or the model begins with no noise.
        """
        if view.towards is None:
            raise UserError("an interpolation needs a second seed")
        with self._lock:
            generator = self._generator(name, view)
            labels = self._labels(generator, view, 1)
            like = torch.empty(1, *generator.latent)
            first, last = (ImageNoise(seed, [0]).normal(like)[0] for seed in (view.seed, view.towards))
            noises = between(first, last, torch.linspace(0, 1, FRAMES))
            return generator.of_noise(noises, labels=None if labels is None else labels * FRAMES, seed=view.seed)

    def near(self, name: str, image: Images) -> Near:
        """The training pictures nearest to one, uint8 [H, W, C]. Raises UserError where they cannot be opened."""
        with self._lock:
            if name not in self._real:
                self._real[name] = real_images(name, self._data, self.files[name].spec, "train")
            real = self._real[name]
            chosen = np.linspace(0, len(real) - 1, min(len(real), MOST_REAL)).astype(np.int64)
            some = real if len(chosen) == len(real) else real.subset(chosen)
            rows, distances = nearest(image[None], some, k=min(NEAREST, len(some)))
            indices = tuple(map(int, chosen[rows[0]]))
            return Near(some.images(rows[0]), tuple(map(float, distances[0])), indices, len(some))

    def check_fill(self, name: str) -> None:
        """Raise UserError for a model that fills in no part of a picture, with the kinds that do."""
        check_model(name, self.files[name].model, "inpaint", {"levels": None, "steps": None})

    def fill(self, name: str, view: View, i: int, image: Images, cells: Collection[tuple[int, int]]) -> Images:
        """Picture i of the view, uint8 [H, W, C], with some of its CELLS x CELLS cells (row, column) drawn anew.

        It is what `imagewright edit --task inpaint` draws with the view's seed and the picture's class. Raises
        UserError where there are none of them, or the model cannot.
        """
        if not cells:
            raise UserError("choose what is to be filled in")
        self.check_fill(name)
        with self._lock:
            file = at_own_size(self.files[name])
            changes = Changes(weight=view.weight) if takes_weight(file.model) else None
            generator = make_generator(file, None, None, (), self._device, changes)
            labels = self._labels(generator, view, view.n)
            chosen = torch.zeros(CELLS, CELLS, dtype=torch.bool)
            for cell in cells:
                chosen[cell] = True
            height, width = (torch.arange(side) * CELLS // side for side in image.shape[:2])
            region = chosen[height][:, width]
            return fill_in(name, file, generator, image, region, -1 if labels is None else labels[i], view.seed)

    def _generator(self, name: str, view: View) -> ImageGenerator:
        file, settings = self.files[name], tuple(view.settings.split())
        changes, more = _guided(file, view, self._guide)
        return make_generator(file, view.sampler, view.steps, (*settings, *more), self._device, changes)

    def _labels(self, generator: ImageGenerator, view: View, n: int) -> list[int] | None:
        if view.label is not None:
            return [view.label] * n if generator.spec.num_classes else None
        drawn = generator.labels(n, view.seed)
        return None if drawn is None else [int(label) for label in drawn]


def _names(spec: DataSpec) -> tuple[str, ...]:
    return spec.class_names or tuple(map(str, range(spec.num_classes)))


def _takes_guide(file: ModelFile) -> bool:
    """Whether a model is one that another guides."""
    return kind_of(file.model) == "denoiser" and not takes_weight(file.model)


def _guided(file: ModelFile, view: View, guide: str | None) -> tuple[Changes, tuple[str, ...]]:
    """The view's guidance as this kind of model takes it: changes, and settings of its sampler."""
    interval = None
    if view.low is not None or view.high is not None:
        interval = (view.low or 0.0, float("inf") if view.high is None else view.high)
    if interval is not None and view.weight is None:
        raise UserError("an interval needs a strength of guidance")
    if view.weight is None:
        return Changes(), ()
    told, tokens = takes_weight(file.model), kind_of(file.model) == "token_model"
    if interval is not None and (told or tokens):
        raise UserError("an interval has no effect on this model, which is guided at all noise levels alike")
    if told:
        return Changes(weight=view.weight), ()
    if tokens:
        return Changes(), (f"guidance={view.weight:g}",)
    if guide is not None and _takes_guide(file):
        return Changes(guidance="auto", guide=guide, weight=view.weight, interval=interval), ()
    return Changes(guidance="cfg", weight=view.weight, interval=interval), ()
