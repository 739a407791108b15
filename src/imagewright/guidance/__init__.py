"""What changes a denoiser without training it: wrappers that are again denoisers, and so compose."""

from imagewright.guidance.guided import Guided, Unlabelled, classifier_free, evaluations, sims
from imagewright.guidance.skip_tuning import SkipScale, SkipTuned, skip_ratios

__all__ = ["Guided", "SkipScale", "SkipTuned", "Unlabelled", "classifier_free", "evaluations", "sims", "skip_ratios"]
