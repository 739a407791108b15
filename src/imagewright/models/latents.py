"""Models that live in an autoencoder's latents: the space, and model and space as one description on disk.

A denoiser, flow or map in latents is none of another kind: it sees latents where others see images, and everything that
asks it, or learns from it, does so unchanged. What stands beside it, the `LatentSpace`, knows the way in and out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.errors import an
from imagewright.models.preconditioning import Describable
from imagewright.types import DataSpec, ModelKind, Noise, UserError, kind_of


class LatentSpace(nn.Module):
    """An autoencoder's latents, brought channel by channel to mean 0 and deviation `scale`.

    autoencoder: of kind "autoencoder". scale: > 0; 0.5 is what EDM's preconditioning and its kin expect of data, 1 what
    LightningDiT takes. mean, std: [C], of the latents before; 0 and 1 until `measured`. Raises UserError.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: nn.Module, scale: float = 0.5) -> None:
        super().__init__()
        if kind_of(autoencoder) != "autoencoder":
            raise UserError(f"a latent space needs an autoencoder, not {an(type(autoencoder).__name__)}")
        require_positive("scale", scale)
        self.autoencoder, self.scale = autoencoder, float(scale)
        self.shape: tuple[int, int, int] = cast(Any, autoencoder).latent
        self.register_buffer("mean", torch.zeros(self.shape[0]))
        self.register_buffer("std", torch.ones(self.shape[0]))
        self.requires_grad_(False)

    def measured(self, mean: Tensor, std: Tensor) -> None:
        """Set the statistics [C] of latents. Raises UserError where a channel does not vary."""
        if not bool((std > 0).all()):
            raise UserError(f"channel {int((std <= 0).nonzero()[0])} of the latents is the same in all images")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def normalised(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents [N, *shape] as models see them."""
        return (latents - _column(self.mean)) / _column(self.std) * self.scale

    def encode(self, images: Tensor, noise: Noise | None = None) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] as models see them: [N, *shape]."""
        return self.normalised(cast(Any, self.autoencoder).encode(images, noise))

    def decode(self, latents: Tensor) -> Tensor:
        """What models make, as images [N, C, H, W] in [-1, 1], float32."""
        own = latents.float() / self.scale * _column(self.std) + _column(self.mean)
        images: Tensor = cast(Any, self.autoencoder).decode(own)
        return images

    def spec(self, of_images: DataSpec) -> DataSpec:
        """What latents of such images are; of another name, as no network that knows the images knows these."""
        channels, side, _ = self.shape
        name = f"{of_images.name} in latents"
        return replace(of_images, name=name, resolution=side, channels=channels)

    def same_as(self, other: LatentSpace | None) -> bool:
        """Whether another space is this one, up to the rounding of its statistics."""
        if other is None:
            return False
        ours, theirs = self.state_dict(), other.state_dict()
        if self.scale != other.scale or ours.keys() != theirs.keys():
            return False
        if any(a.shape != b.shape for a, b in zip(ours.values(), theirs.values(), strict=True)):
            return False
        if any(t.is_meta for t in (*ours.values(), *theirs.values())):
            return True
        near = {name: 1e-3 if name in ("mean", "std") else 0.0 for name in ours}
        return all(torch.allclose(ours[k], theirs[k], rtol=near[k], atol=near[k]) for k in ours)

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        own = cast(Describable, self.autoencoder).describe()
        return {"class": type(self).__name__, "autoencoder": own, "scale": self.scale}


def _column(each: Tensor) -> Tensor:
    return each[:, None, None]


class InLatents(nn.Module):
    """A model and the space that it lives in, as they are stored. `models.files` takes them apart again."""

    def __init__(self, model: nn.Module, space: nn.Module) -> None:
        super().__init__()
        if not isinstance(space, LatentSpace):
            raise UserError(f"a model in latents needs a LatentSpace, not {an(type(space).__name__)}")
        config = getattr(getattr(model, "network", None), "config", None)
        theirs = getattr(config, "in_channels", space.shape[0]), getattr(config, "img_resolution", space.shape[1])
        if theirs != space.shape[:2]:
            raise UserError(
                f"the model sees {theirs[0]} channels of side {theirs[1]}; the autoencoder's latents have "
                f"{space.shape[0]} of side {space.shape[1]}"
            )
        self.model, self.space = model, space

    @property
    def kind(self) -> ModelKind:
        """The model's own."""
        return kind_of(self.model)

    def describe(self) -> dict[str, Any]:
        """As `models.description` wants it."""
        model = cast(Describable, self.model).describe()
        return {"class": type(self).__name__, "model": model, "space": self.space.describe()}
