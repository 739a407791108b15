"""How a run trains: sizes, rates, averages, precision.

Everything that lasts is counted in images, so that the batch size moves no schedule; a number below 1 is a share of the
run (`Span`), so that its length moves none either.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from imagewright.checks import require_non_negative, require_positive
from imagewright.precision import Precision
from imagewright.training.trackers import check_trackers
from imagewright.types import Span, UserError

Cooldown = Literal["linear", "cosine", "quarter"]
OptimizerKind = Literal["adafactor", "adam", "adamw", "radam", "sgd"]
Parallel = Literal["replicate", "shard"]


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Averages of the weights, updated after every optimiser step."""

    halflife_images: Span = 500_000
    """Images until a weight's share in the average has halved (EDM: 0.5 M on CIFAR-10, 50 M on ImageNet-64)."""
    rampup_ratio: float | None = 0.05
    """The half-life is at most this share of the images seen so far; None = no ramp-up."""
    power_std: tuple[float, ...] = ()
    """Relative widths of further power-function averages (EDM2, section 3), snapshotted for post-hoc use."""

    def __post_init__(self) -> None:
        if not self.halflife_images >= 0:
            raise UserError(f"ema.halflife_images is {self.halflife_images}; it must be >= 0")
        if self.rampup_ratio is not None and not self.rampup_ratio > 0:
            raise UserError(f"ema.rampup_ratio is {self.rampup_ratio}; it must be positive, or none")
        if any(not 0 < s < 0.29 for s in self.power_std):
            raise UserError(f"ema.power_std is {self.power_std}; every entry must lie in (0, 0.29)")
        if len(set(self.power_std)) < len(self.power_std):
            raise UserError(f"ema.power_std is {self.power_std}; no entry may occur twice")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser of every trained part."""

    kind: OptimizerKind = "adam"
    lr: float = 1e-3
    lr_ramp_images: Span = 0
    """Images over which the learning rate rises linearly from zero."""
    lr_decay_images: Span | None = None
    """EDM2's inverse-square-root decay, starting after this many images; None = constant."""
    lr_cooldown_images: Span = 0
    """Last images of the run over which the rate falls."""
    lr_cooldown_shape: Cooldown = "linear"
    """How it falls: in a straight line, as half a cosine, or as the first quarter of one, which is slow at first."""
    lr_cooldown_to: float = 0.0
    """Share of the rate to which it falls."""
    lr_step_images: Span | None = None
    """Each time so many images have been seen, the rate is multiplied by lr_step_factor; None = never."""
    lr_step_factor: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    """Of sgd, which has no betas and no eps. adafactor (Shazeer and Stern 2018, 1804.04235) has none of these: its
    rate is in units of a weight's root mean square, and at step k at most k^-1/2, as torch has it."""
    nesterov: bool = False
    """Whether sgd's momentum looks ahead."""
    weight_decay: float = 0.0
    """Added to the gradient (adam, radam, sgd), or taken off the weights beside it (adamw, adafactor)."""
    decay_vectors: bool = True
    """Whether it falls on vectors and single numbers too: biases, gains of norms, a scale."""
    clip_norm: float | None = None
    """Largest gradient norm of a part; None = no clipping (EDM and the consistency papers use none)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(OptimizerKind):
            raise UserError(f"optimizer.kind is {self.kind!r}; allowed: {', '.join(get_args(OptimizerKind))}")
        require_positive("optimizer.lr", self.lr)
        if self.lr_cooldown_shape not in get_args(Cooldown):
            raise UserError(
                f"optimizer.lr_cooldown_shape is {self.lr_cooldown_shape!r}; allowed: {', '.join(get_args(Cooldown))}"
            )
        for name in ("lr_ramp_images", "lr_cooldown_images"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be >= 0")
        if not 0 <= self.lr_cooldown_to <= 1:
            raise UserError(f"optimizer.lr_cooldown_to is {self.lr_cooldown_to}; it must lie in [0, 1]")
        if self.lr_decay_images is not None and not self.lr_decay_images > 0:
            raise UserError(f"optimizer.lr_decay_images is {self.lr_decay_images}; it must be above 0, or none")
        if self.lr_step_images is not None and not self.lr_step_images > 0:
            raise UserError(f"optimizer.lr_step_images is {self.lr_step_images}; it must be above 0, or none")
        require_positive("optimizer.lr_step_factor", self.lr_step_factor)
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.momentum is {self.momentum}; it must lie in [0, 1)")
        if self.nesterov and not self.momentum:
            raise UserError("optimizer.nesterov needs a momentum above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}; both must lie in [0, 1)")
        if not self.decay_vectors and not self.weight_decay:
            raise UserError("optimizer.decay_vectors has no effect without optimizer.weight_decay")
        for name in ("eps", "weight_decay"):
            require_non_negative(f"optimizer.{name}", getattr(self, name))
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm is {self.clip_norm}; it must be positive, or none")

    def lr_at(self, images: float, total_images: int) -> float:
        """Learning rate after `images` of a run's `total_images` images.

        The trainer asks with the batch at hand counted, so every ramp and cool-down is one batch ahead of programs that
        count the batches before it (EDM's, and optax).
        """
        lr = self.lr
        if self.lr_ramp_images:
            lr *= min(images / self.lr_ramp_images, 1.0)
        if self.lr_decay_images:
            lr /= max(images / self.lr_decay_images, 1.0) ** 0.5
        if self.lr_step_images:
            lr *= self.lr_step_factor ** max(math.ceil(images / self.lr_step_images) - 1, 0)
        if self.lr_cooldown_images:
            left = min(max(total_images - images, 0) / self.lr_cooldown_images, 1.0)
            if self.lr_cooldown_shape != "linear":
                whole = self.lr_cooldown_shape == "cosine"
                left = (1 - math.cos(math.pi * left)) / 2 if whole else math.sin(math.pi / 2 * left)
            lr *= self.lr_cooldown_to + (1 - self.lr_cooldown_to) * left
        return lr


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Size and pace of a run."""

    total_images: int
    """Images to train on, counting repeats."""
    batch: int
    """Images per optimiser step, over all processes and accumulation."""
    micro_batch: int | None = None
    """Images per forward pass; smaller than `batch` means gradient accumulation. None = batch / processes."""
    seed: int = 0
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    precision: Precision = "fp32"
    """Number format of the networks' forward passes (autocast); weights stay float32; fp16 scales the loss."""
    tf32: bool = False
    """Let NVIDIA's GPUs round the inputs of float32 products to 10 bits, several times as fast; elsewhere no effect."""
    channels_last: bool = False
    compile: bool = False
    """Compile the trained networks with torch.compile."""
    graphs: bool = False
    """Replay a step's passes as one CUDA graph where the method permits."""
    recompute: bool = False
    """Do not keep what is inside of a network's blocks for backward: less memory, a third more computation."""
    parallel: Parallel = "replicate"
    """Of several processes each has every network whole (replicate), or a share of its blocks, moments and averages
    (shard)."""
    log_images: Span = 2_000
    """Images between two lines of the log."""
    snapshot_images: Span = 50_000
    """Images between two sample grids."""
    checkpoint_images: Span = 50_000
    """Images between two checkpoints of the full state."""
    keep_checkpoints: int = 2
    weights_images: Span | None = None
    """Images between two kept sets of the product's weights, raw and each ema.power_std; None = keep none."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where numbers and snapshots also go: tensorboard, wandb, mlflow, trackio; below the run's folder, nowhere else
    unless the environment says so. log.jsonl and samples/ are always written."""

    def __post_init__(self) -> None:
        for name in ("total_images", "batch", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("log_images", "snapshot_images", "checkpoint_images"):
            if not getattr(self, name) > 0:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be at least 1, or a share below it")
        if self.weights_images is not None and not self.weights_images > 0:
            raise UserError(f"training.weights_images is {self.weights_images}; it must be at least 1, or none")
        check_trackers(self.trackers)
        if self.precision not in get_args(Precision):
            raise UserError(f"training.precision is {self.precision!r}; allowed: {', '.join(get_args(Precision))}")
        if self.parallel not in get_args(Parallel):
            raise UserError(f"training.parallel is {self.parallel!r}; allowed: {', '.join(get_args(Parallel))}")
        if self.parallel == "shard" and self.optimizer.kind == "adafactor":
            raise UserError(
                "training.parallel is 'shard', where a process has some rows; optimizer.kind adafactor keeps means "
                "over whole columns; allowed: replicate, or another optimiser"
            )
        if self.seed < 0:
            raise UserError(f"training.seed is {self.seed}; it must be >= 0")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise UserError(f"training.micro_batch is {self.micro_batch}; it must divide training.batch ({self.batch})")

    def in_images(self) -> TrainingConfig:
        """The same with every share of the run as a number of images."""
        return in_images(self, self.total_images)


Settings = TypeVar("Settings")


def images_of(span: Span, total_images: int) -> Span:
    """A span in images; a share is rounded, to at least one."""
    return max(round(span * total_images), 1) if 0 < span < 1 else span


def in_images(settings: Settings, total_images: int) -> Settings:
    """A dataclass, and those in it, with every share of the run (of fields named `..._images`) in images."""
    changed: dict[str, Any] = {}
    for each in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, each.name)
        if each.name.endswith("_images") and isinstance(value, float):
            changed[each.name] = images_of(value, total_images)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed[each.name] = in_images(value, total_images)
    return dataclasses.replace(settings, **changed)  # type: ignore[type-var]
