"""Which images a run learns from: a set's name, a zip or a folder, and what of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imagewright.checks import require_positive, require_whole
from imagewright.data.curation.balancing import Balance
from imagewright.data.curation.labelled import balanced
from imagewright.data.image_set import ImageSet
from imagewright.data.opening import open_images
from imagewright.data.partition import of_classes
from imagewright.data.source import DataSource
from imagewright.types import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig(DataSource):
    """Which images to learn from."""

    source: str
    """"digits", "emoji64", or the path of an EDM-format zip or image folder."""
    resolution: int | None = None
    """Reduce to this size by box filter; None = the set's own size."""
    split: str = "train"
    xflip: bool = False
    """Mirror images at random (without telling the network)."""
    labels: bool = True
    """Train class-conditionally where the set has classes."""
    classes: tuple[str, ...] = ()
    """Learn from pictures of these classes alone, by number, range of numbers ("0-249") or name; () = all. The model is
    told classes by the numbers that they have in the whole set. Pairs (`couplings`) stay those of all classes."""
    skip_bad: bool = False
    """Leave out unusable files instead of refusing the set."""
    workers: int = 0
    """Processes that decode pictures of a set too large to stay decoded in memory; 0 = threads of this one."""
    couplings: str | tuple[str, ...] | None = None
    """Folder of pairs of noise and image that `imagewright couple` has written, for methods that learn from them; or
    several, of which every batch has its share."""
    latents: str | None = None
    """Folder of the images' latents, where the run has an autoencoder: they are written where they are not there yet;
    None = kept between commands where the package keeps such things, which wants room: 16 KB an image of 256 x 256."""
    latent_std: float = 0.5
    """Deviation to which each channel of an autoencoder's latents is brought; the deviation that a method expects of
    its data (EDM's 0.5)."""
    balance: float | None = None
    """Show pictures of common classes less often, anew in each pass (docs/captions.md): the share of pictures that are
    of classes which are always shown; 0.06 as published for captions; none = all pictures in every pass."""
    coupling_weights: tuple[float, ...] = ()
    """Shares of several folders of pairs, one for each, in any unit; () = by their numbers of pairs."""

    def __post_init__(self) -> None:
        if isinstance(self.couplings, tuple):
            alone = self.couplings[0] if len(self.couplings) == 1 else self.couplings or None
            object.__setattr__(self, "couplings", alone)
        if self.coupling_weights and not isinstance(self.couplings, tuple):
            raise UserError("data.coupling_weights has no effect without several folders in data.couplings")
        if self.classes and not self.labels:
            raise UserError("data.classes chooses among labels; it goes with data.labels")
        if self.balance is not None and not self.labels:
            raise UserError("data.balance counts labels; it goes with data.labels")
        Balance(tail=self.balance)
        require_positive("data.latent_std", self.latent_std)
        require_whole("data.workers", self.workers, 0, 1024)

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> ImageSet:
        """Open and check the images."""
        images = open_images(
            self.source,
            resolution=self.resolution,
            split=self.split,  # type: ignore[arg-type]  # checked by open_images
            labels=self.labels,
            skip_bad=self.skip_bad,
            on_progress=on_progress,
        )
        images = of_classes(images, self.classes)
        return images if self.balance is None else balanced(images, Balance(tail=self.balance))[0]
