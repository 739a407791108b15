"""Where a run's numbers and pictures also go: TensorBoard, Weights & Biases, MLflow, trackio. None but by name.

Contract: `log.jsonl` and `samples/` are written whatever happens here; a tracker that fails is told once and left out.
Nothing leaves the machine unless the user's own environment says where to (WANDB_MODE=online, MLFLOW_TRACKING_URI):
each tracker writes below the run's folder, and the packages' own telemetry is switched off.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from imagewright.types import UserError

Images = npt.NDArray[np.uint8]
QUIET: Mapping[str, str] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_ERROR_REPORTING": "false",
}
"""What the packages read before they report their use; set where the user has said nothing."""


class Tracker(Protocol):
    """One destination. images: seen so far, the run's clock."""

    def numbers(self, values: Mapping[str, float], images: int) -> None:
        """Losses, rates and the like, by name."""
        ...

    def picture(self, name: str, pixels: Images, images: int) -> None:
        """uint8 [H, W, 1 or 3]."""
        ...

    def close(self) -> None:
        """Everything is written."""
        ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(folder)

    def numbers(self, values: Mapping[str, float], images: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, images)
        self._board.flush()

    def picture(self, name: str, pixels: Images, images: int) -> None:
        self._board.add_image(name, pixels, images, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """Offline below the run's folder (`wandb sync` sends it later), or as WANDB_MODE says."""

    def __init__(self, folder: Path) -> None:
        self._wandb = _package("wandb")
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = self._wandb.init(
            project="imagewright", name=folder.name, dir=str(folder), mode=mode, save_code=False
        )

    def numbers(self, values: Mapping[str, float], images: int) -> None:
        self._run.log(dict(values), step=images)

    def picture(self, name: str, pixels: Images, images: int) -> None:
        self._run.log({name: self._wandb.Image(_rgb(pixels))}, step=images)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A store below the run's folder, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path) -> None:
        self._mlflow = _package("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
        self._mlflow.set_tracking_uri(uri)
        self._mlflow.set_experiment("imagewright")
        self._mlflow.start_run(run_name=folder.name)

    def numbers(self, values: Mapping[str, float], images: int) -> None:
        self._mlflow.log_metrics(dict(values), step=images)

    def picture(self, name: str, pixels: Images, images: int) -> None:
        self._mlflow.log_image(_rgb(pixels), key=name, step=images)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """A local store below the run's folder, or where TRACKIO_DIR says; never a space of the hub."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
        self._trackio = _package("trackio")
        self._run = self._trackio.init(project="imagewright", name=folder.name)

    def numbers(self, values: Mapping[str, float], images: int) -> None:
        self._trackio.log(dict(values), step=images)

    def picture(self, name: str, pixels: Images, images: int) -> None:
        self._trackio.log({name: self._trackio.Image(_rgb(pixels))}, step=images)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}
"""Every tracker by the name that training.trackers takes."""


class Tracked:
    """All trackers of a run as one, and none of them able to end it."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        check_trackers(names)
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._suffering(name):
                self._open[name] = TRACKERS[name](folder)

    def numbers(self, values: Mapping[str, float], images: int) -> None:
        """To each of them."""
        for name, tracker in list(self._open.items()):
            with self._suffering(name):
                tracker.numbers(values, images)

    def picture(self, title: str, pixels: Images, images: int) -> None:
        """To each of them."""
        for name, tracker in list(self._open.items()):
            with self._suffering(name):
                tracker.picture(title, pixels, images)

    def close(self) -> None:
        """Of each of them."""
        for name, tracker in list(self._open.items()):
            with self._suffering(name):
                tracker.close()

    @contextmanager
    def _suffering(self, name: str) -> Iterator[None]:
        """Leave out a tracker that fails; what is missing altogether is the user's to mend."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a package's own: full disks, services that are away
            self._open.pop(name, None)
            words = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"tracker {name} failed and is left out: {words}", stacklevel=2)


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a name that is none, or occurs twice."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"training.trackers has no {name!r}; there are {', '.join(TRACKERS)}")
    if len(set(names)) < len(names):
        raise UserError(f"training.trackers is {', '.join(names)}; no tracker may occur twice")


def _package(name: str) -> Any:
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"tracker {name} needs a package: pip install 'imagewright[{name}]'") from None


def _rgb(pixels: Images) -> Images:
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
