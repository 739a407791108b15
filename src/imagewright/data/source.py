"""What the trainer asks of a run's data, whatever kind of examples they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class DataSource:
    """Where a run's examples come from; a kind of data is a frozen dataclass below this class.

    What a kind has no field for is as it is here, so that all are asked alike and an option that a kind lacks cannot be
    given.
    """

    source: str
    """A set's name, or the path of a file or folder."""
    resolution: int | None = None
    labels: bool = True
    xflip: bool = False
    """Mirror images at random."""
    workers: int = 0
    """Processes that read; 0 = threads of this one."""
    couplings: str | tuple[str, ...] | None = None
    """Folders of pairs of noise and image."""
    coupling_weights: tuple[float, ...] = ()
    latents: str | None = None
    """Folder of the images' latents."""
    latent_std: float = 0.5

    def open(self, on_progress: Callable[[int, int], None] | None = None) -> Any:
        """Open and check the examples: a data set (`types.Examples`). Raises UserError for damaged ones."""
        raise NotImplementedError

    def absent(self) -> Any:
        """An empty set like the one that would be there, for a dry run; None where there is one."""
        return None
