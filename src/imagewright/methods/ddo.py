"""Direct discriminative optimisation, DDO (Zheng et al. 2025, arXiv 2503.01103): a likelihood model as its own GAN.

Networks   model (trained, the product), reference (frozen): both start as the run's reference, a denoiser or a token
           model with an exact likelihood. Both are asked in eval mode: no dropout, no augmentation, no hidden classes.
Loss       equations 8 and 9: -log d(x) of real images - alpha log(1 - d(x)) of the reference's own, with
           d = sigmoid(beta log p_model / p_reference); log(1 - sigmoid(s)) as logsigmoid(-s), in float32 at least.
           Gradient: (1 - d)(p_model - p_data) grad log p_model, at alpha = beta = 1 and p_reference = p_model.
Denoisers  (section 3.3) log p's difference is Delta = -(|F_model - F*|^2 - |F_reference - F*|^2), F the network's own
           output, F* = (x0 - c_skip x_t) / c_out: EDM's weight times the squared errors' difference, *summed* over an
           image's numbers. One sigma and noise for both models; real and drawn images have their own. Written as a
           product of difference and sum, so that it is 0 at the start and keeps its digits.
Tokens     Delta is the difference of the exact log-likelihoods, summed over the tokens, each image with its class.
Negatives  drawn before the round by the reference's usual sampler, unguided, with the classes that they were drawn for
           (`data.negatives`); as many as real images in a batch, at random.
Self-play  a round's best weights along its way, by a distance of images, are the next one's reference, which draws
           negatives anew (`recipes.ddo.self_play`: a chain).
Source     The paper, and NVlabs/DDO, which has the sampling of its finetuned models only: it shows unchanged networks
           and samplers (EDM: Heun, 18 steps), and no setting of the training.
Departs    alpha, beta, rate, length and ratio of negatives of the paper's runs are not known to us; recipes have ours.
           A chain keeps the best weights of a round; alpha and beta are for its reader to vary. VAR's likelihood over
           scales is not built in, as VAR is not. EDM2's learnt weight of levels is not used.
Checked    loss (1 + alpha) log 2 and its gradient at the start; optimum on a categorical law, beta 1 and 1/2; the
           gradient view above; Delta in F-, x0- and eps-form; exact autoregressive models; resume bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from imagewright.checks import require_positive
from imagewright.data.negatives import Negatives
from imagewright.errors import an
from imagewright.methods.edm import loss_weight
from imagewright.methods.pairs import column
from imagewright.methods.uni_instruct import in_mode
from imagewright.models.consistency import edm_teacher
from imagewright.noise import StepNoise
from imagewright.paths.noise_levels import LogNormal
from imagewright.types import (
    Batch,
    Clock,
    Condition,
    DataSpec,
    Denoiser,
    Event,
    Frozen,
    Parts,
    TokenModel,
    Trained,
    Update,
    UserError,
    kind_of,
)


@dataclass(frozen=True, kw_only=True)
class DDO:
    """Finetune a model to tell real images from its own former ones by its likelihood."""

    product: ClassVar[str] = "model"

    alpha: float = 1.0
    """Weight of the negatives (0.5 to 50 in the paper). In the plane 4 drove a denoiser away from its data."""
    beta: float = 0.05
    """Scale of the log-likelihoods' difference (0.01 to 0.1 in the paper); below 1 it aims beyond the data's law."""
    levels: LogNormal = LogNormal(mean=-1.2, std=1.2)
    """Noise levels, of a denoiser (EDM's; EDM2's are mean -0.8, std 1.6)."""

    def __post_init__(self) -> None:
        require_positive("method.alpha", self.alpha)
        require_positive("method.beta", self.beta)

    def parts(self, *, reference: Denoiser | TokenModel, negatives: Negatives, spec: DataSpec) -> Parts:
        """reference: an EDM-preconditioned denoiser, or a token model with an exact likelihood.

        negatives: what it drew; None = none are there, in a dry run. Raises UserError for another reference, and for
        negatives of another kind or size.
        """
        known: Any = reference
        what: str = "images"
        shape: tuple[int, ...] = spec.shape
        if kind_of(reference) == "token_model":
            if getattr(reference, "likelihood", None) != "exact":
                raise UserError(
                    f"the reference is {an(type(reference).__name__)}, whose likelihood is not exact; "
                    "a causal token model's is"
                )
            what, shape = "tokens", (known.codec.length,)
        else:
            edm_teacher(reference)
        if negatives is not None:
            drawn = negatives.manifest
            if (drawn.what, drawn.shape, drawn.classes) != (what, shape, spec.num_classes):
                raise UserError(
                    f"negatives are {drawn.what} {list(drawn.shape)} of {drawn.classes} classes; this reference takes "
                    f"{what} {list(shape)} of {spec.num_classes}"
                )
        model = copy.deepcopy(known).requires_grad_(True)
        if what == "tokens" and isinstance(model.codec, torch.nn.Module):
            model.codec.requires_grad_(False)
        parts: Any = Parts(model=Trained(module=model), reference=Frozen(module=known))
        parts.negatives = negatives  # data, not a network
        made: Parts = parts
        return made

    def step(self, parts: Any, batch: Batch, noise: StepNoise, clock: Clock) -> Iterator[Event]:
        """One update of the model, on real images and as many negatives."""
        like = batch.images[:, 0, 0, 0]
        drawn, drawn_cond = parts.negatives.read(noise.integers(len(parts.negatives), like))
        cond = Condition(label=batch.cond.label)
        with in_mode(False, parts.model):
            if kind_of(parts.reference) == "token_model":
                with torch.no_grad():
                    tokens = parts.model.codec.encode(batch.images)
                of_real, of_drawn = token_ratio(parts, tokens, cond), token_ratio(parts, drawn, drawn_cond)
            else:
                of_real = self.image_ratio(parts, batch.images, cond, noise)
                of_drawn = self.image_ratio(parts, drawn.to(batch.images), drawn_cond, noise)
        numbers = {"log_ratio_real": of_real, "log_ratio_drawn": of_drawn}
        yield Update("model", discriminative_loss(of_real, of_drawn, self.alpha, self.beta), parts=numbers)

    def image_ratio(self, parts: Any, images: Tensor, cond: Condition, noise: StepNoise) -> Tensor:
        """Delta [N] of images [N, C, H, W] at one noise level each."""
        sigma = self.levels.sample(noise, images[:, 0, 0, 0])
        noisy = images + column(sigma) * noise.normal(images)
        with torch.no_grad():
            theirs = parts.reference(noisy, sigma, cond)
        ours = parts.model(noisy, sigma, cond)
        apart: Tensor = ((ours - theirs) * (ours + theirs - 2 * images)).flatten(1).sum(1)
        return -loss_weight(sigma, parts.model.sigma_data) * apart


def token_ratio(parts: Any, tokens: Tensor, cond: Condition) -> Tensor:
    """log p_model - log p_reference [N] of tokens [N, length]."""
    with torch.no_grad():
        theirs = parts.reference.nll(tokens, cond)
    difference: Tensor = theirs - parts.model.nll(tokens, cond)
    return difference


def discriminative_loss(of_real: Tensor, of_drawn: Tensor, alpha: float, beta: float) -> Tensor:
    """-log d of real images' log-ratios - alpha log(1 - d) of drawn ones', [N] each."""
    wide = torch.promote_types(of_real.dtype, torch.float32)
    return -F.logsigmoid(beta * of_real.to(wide)) - alpha * F.logsigmoid(-beta * of_drawn.to(wide))
