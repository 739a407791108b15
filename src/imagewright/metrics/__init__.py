"""Measuring images: Frechet and kernel distances, classifier score, neighbours, reports with provenance."""

from imagewright.metrics.evaluate import METRICS, Report, evaluate
from imagewright.metrics.features import FeatureExtractor, ImageSource, digits_features, emoji_features
from imagewright.metrics.frechet import frechet_distance
from imagewright.metrics.inception import InceptionFeatures
from imagewright.metrics.inception_score import InceptionScore, inception_score
from imagewright.metrics.kernel import KernelDistance, kernel_distance
from imagewright.metrics.memorisation import nearest
from imagewright.metrics.neighbours import Neighbourhood, neighbourhood
from imagewright.metrics.reference import Reference, embed
from imagewright.metrics.statistics import FeatureStatistics, Moments, load_moments, save_moments
from imagewright.metrics.yardsticks import Yardstick, measure_yardsticks

__all__ = [
    "METRICS",
    "FeatureExtractor",
    "FeatureStatistics",
    "ImageSource",
    "InceptionFeatures",
    "InceptionScore",
    "KernelDistance",
    "Moments",
    "Neighbourhood",
    "Reference",
    "Report",
    "Yardstick",
    "digits_features",
    "embed",
    "emoji_features",
    "evaluate",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_moments",
    "measure_yardsticks",
    "nearest",
    "neighbourhood",
    "save_moments",
]
