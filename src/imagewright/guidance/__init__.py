"""What changes a denoiser without training it: wrappers that are again denoisers, and so compose."""

from imagewright.guidance.guided import (
    Guided,
    Unlabelled,
    classifier_free,
    evaluations,
    guided_by,
    knows_no_label,
    latent_guidance,
    sims,
)
from imagewright.guidance.layer_skipping import LayerSkipped
from imagewright.guidance.skip_tuning import SkipScale, SkipTuned, skip_ratios

__all__ = [
    "Guided",
    "LayerSkipped",
    "SkipScale",
    "SkipTuned",
    "Unlabelled",
    "classifier_free",
    "evaluations",
    "guided_by",
    "knows_no_label",
    "latent_guidance",
    "sims",
    "skip_ratios",
]
