"""VA-VAE (Yao et al. 2025, arXiv 2501.01423): an autoencoder whose latents a frozen vision network keeps in order.

Networks   autoencoder (trained, the product: encoder, decoder, and the 1x1 convolution W, without bias, that takes its
           latents to the features), discriminator (trained, one step for each of the autoencoder's; none where
           `adversarial` is 0), features (frozen, of the perceptual distance; none where `perceptual` is 0), vision
           (frozen, whose maps F the latents are aligned with; none where `vf` is 0).
Base       that of latent diffusion (Rombach et al. 2022, 2112.10752). L_rec = sum over numbers of
           |x - x_hat| + perceptual * d(x, x_hat), x_hat of drawn latents z; + kl * KL(q(z|x) | N(0, I)), summed; +
           adversarial * w * mean over patches of -D(x_hat), w = |grad L_rec| / (|grad of that| + 1e-4) at the decoder's
           last weight, at most 1e4; all of them means over the batch.
VF         vf * w_ad * (L_mcos + L_mdms), w_ad = |grad L_rec| / (|grad (L_mcos + L_mdms)| + 1e-4) at the encoder's last
           3x3 weight, at most 1e8.   z' = W z, of drawn latents.
           L_mcos = mean over places of relu(1 - cosine_margin - cos(z', F)).
           L_mdms = mean over pairs of places of relu(|cos(z'_i, z'_j) - cos(F_i, F_j)| - distance_margin). The paper
           writes z_i for both; its program has the projected z'_i, and so has this.
Adversary  hinge: (relu(1 - D(x)) + relu(1 + D(x_hat))) / 2; x_hat is that of the autoencoder's own step. It comes in
           after `adversarial_start_images`. The program's 5,001 counts the steps of both optimisers: batch 2,501.
Published  Adam (0.5, 0.9) at 1e-4 for both, no averages; three stages: vf 0.5 without margins, 0.1, 0.1 with margins
           0.5 and 0.25; the last two with the discriminator from the start (`recipes.latents`).
Departs    ln(variance) of the reconstruction, a number that is 0 and in no optimiser of the program, is left out.
           `lpips` is seen at 224 x 224, the program's at the pictures' own size. Where pictures have no classifier of
           ImageNet, our classifiers' maps stand in for LPIPS's and DINOv2's (the last one before its rectification).
           Maps on another grid than the latents' are interpolated. The two adaptive weights are those of a micro-batch,
           as in the program those of a process's share. The program's discriminator begins a batch before the
           autoencoder hears of it, and its Adam, which until then counts steps without a gradient, no longer corrects
           its moments: its first steps are up to 1.7 times ours. The paper's other vision network, MAE, is left out.
Checked    the VF loss and both weights against the released program; that F = W z costs nothing; that L_mdms does not
           change when z' is turned or scaled; no gradient within the margins; the weighted gradient's norm; counts of
           parameters; resume bit for bit, discriminator included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imagewright.checks import require_non_negative, require_whole
from imagewright.methods.adversary import adaptive_weight
from imagewright.methods.distances import Distance, Features
from imagewright.metrics.extractors import OF_DATA
from imagewright.metrics.vision import VisionFeatures
from imagewright.models.kl import GaussianAutoencoder
from imagewright.networks.patch_discriminator import PatchDiscriminator
from imagewright.noise import StepNoise
from imagewright.types import Batch, Clock, DataSpec, Event, Frozen, Parts, Span, Trained, Update, UserError

PERCEPTUAL = Distance(kind="perceptual")
MOST_VF = 1e8
"""At most the weight of the VF loss."""


@dataclass(frozen=True, kw_only=True)
class VAVAE:
    """Images through normally distributed latents and back, and the latents near a frozen network's features."""

    product: ClassVar[str] = "autoencoder"
    of_images: ClassVar[bool] = True

    perceptual: float = 1.0
    """Weight of the distance between feature maps, of every number of an image; needs `features`, or 0."""
    kl: float = 1e-6
    """Weight of the divergence of the latents' distribution from a standard normal one."""
    adversarial: float = 0.5
    """0 = without a discriminator."""
    adversarial_start_images: Span = 640_000
    """Images after which the discriminator comes in."""
    discriminator_width: int = 64
    discriminator_layers: int = 3
    """Halvings of the resolution."""
    vf: float = 0.1
    """Weight of the alignment with a vision network's features (`vision`); 0 = the autoencoder of latent diffusion."""
    cosine_margin: float = 0.5
    """How far from 1 the cosine of latents and features may be without cost."""
    distance_margin: float = 0.25
    """How far apart cosines of two places may be, in latents and in features, without cost."""

    def __post_init__(self) -> None:
        for name in ("perceptual", "kl", "adversarial", "adversarial_start_images", "vf"):
            require_non_negative(f"method.{name}", getattr(self, name))
        for name, most in (("cosine_margin", 2), ("distance_margin", 2)):
            if not 0 <= getattr(self, name) < most:
                raise UserError(f"method.{name} is {getattr(self, name)}; it must lie in [0, {most})")
        for name in ("discriminator_width", "discriminator_layers"):
            require_whole(f"method.{name}", getattr(self, name), 1, 4096)

    def parts(
        self,
        *,
        network: nn.Module,
        spec: DataSpec,
        features: Features | None = None,
        vision: VisionFeatures | None = None,
    ) -> Parts:
        """network: a `networks.KLAutoencoder`. Raises UserError for another, or where features are missing."""
        more: dict[str, Trained | Frozen] = {}
        if self.perceptual:
            if not isinstance(features, nn.Module):
                raise UserError(
                    f"method.perceptual is {self.perceptual}; it needs a feature network (`features`), or must be 0"
                )
            more["features"] = Frozen(module=features)
        if self.vf:
            vision = vision or _usual_vision(spec, self.vf)
            more["vision"] = Frozen(module=vision)
        elif vision is not None:
            raise UserError("vision has no effect where method.vf is 0")
        if self.adversarial:
            judge = PatchDiscriminator(
                spec.resolution, spec.channels, self.discriminator_width, self.discriminator_layers
            )
            more["discriminator"] = Trained(module=judge, ema=False)
        aligned = vision.dim if self.vf and vision is not None else 0
        return Parts(autoencoder=Trained(module=GaussianAutoencoder(network, aligned), ema=True), **more)

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the autoencoder, then one of the discriminator."""
        fights = self.adversarial > 0 and clock.images >= self.adversarial_start_images
        rebuilt, mean, log_variance, latents = parts.autoencoder(batch.images, noise)
        yield self._learn(parts, batch.images, rebuilt, mean, log_variance, latents, fights)
        if fights:
            real, fake = parts.discriminator(batch.images), parts.discriminator(rebuilt.detach())
            kept, refused = F.relu(1 - real).mean(1), F.relu(1 + fake).mean(1)
            yield Update("discriminator", (kept + refused) / 2, parts={"real": kept, "fake": refused})

    def _learn(
        self,
        parts: Any,
        images: Tensor,
        rebuilt: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        latents: Tensor,
        fights: bool,
    ) -> Update:
        network = parts.autoencoder.network
        difference = (images - rebuilt).abs().flatten(1)
        reconstruction, numbers = difference.sum(1), {"l1": difference.mean(1)}
        if self.perceptual:
            numbers["perceptual"] = PERCEPTUAL(rebuilt, images, parts.features)
            reconstruction = reconstruction + self.perceptual * difference.shape[1] * numbers["perceptual"]
        numbers["kl"] = divergence(mean, log_variance)
        loss = reconstruction + self.kl * numbers["kl"]
        if fights:
            numbers["adversarial"] = -parts.discriminator(rebuilt).mean(1)
            weight = adaptive_weight(reconstruction, numbers["adversarial"], network.last_layer)
            loss = loss + self.adversarial * weight * numbers["adversarial"]
            numbers["adversarial_weight"] = weight
        if self.vf:
            projected = parts.autoencoder.project(latents)
            aimed = parts.vision(images, projected.shape[2])
            numbers["cosine"] = cosine_loss(projected, aimed, self.cosine_margin)
            numbers["distance"] = distance_loss(projected, aimed, self.distance_margin)
            vf = numbers["cosine"] + numbers["distance"]
            weight = adaptive_weight(reconstruction, vf, network.last_of_encoder, most=MOST_VF)
            loss = loss + self.vf * weight * vf
            numbers["vf_weight"] = weight
        return Update("autoencoder", loss, parts=numbers)


def _usual_vision(spec: DataSpec, vf: float) -> VisionFeatures:
    """The classifier of the data set. Raises UserError where there is none."""
    name = OF_DATA.get(spec.name)
    if name is None:
        raise UserError(f"method.vf is {vf}; it needs a vision network (`vision`), or must be 0")
    with torch.device("cpu"):  # also where the run is only planned
        return VisionFeatures.open(name)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of normal distributions [N, ...] from the standard one, in nats, summed: [N]."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1) / 2


def cosine_loss(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """Mean over places of relu(1 - margin - cos): [N]. latents, features: [N, D, h, w]."""
    cosine = F.cosine_similarity(latents, features, dim=1)
    return F.relu(1 - margin - cosine).flatten(1).mean(1)


def distance_loss(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """Mean over pairs of places of relu(|difference of their cosines| - margin): [N]. As `cosine_loss`."""
    ours, theirs = (_cosines(each) for each in (latents, features))
    return F.relu((ours - theirs).abs() - margin).flatten(1).mean(1)


def _cosines(maps: Tensor) -> Tensor:
    """Of all pairs of places of maps [N, D, h, w]: [N, h w, h w]."""
    each = F.normalize(maps.flatten(2), dim=1)
    return torch.einsum("nci,ncj->nij", each, each)
