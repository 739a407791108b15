"""Distributions whose denoiser, score, density and flow are exact: the truth for methods."""

from imagewright.oracles.flow import IntegratedFlowMap
from imagewright.oracles.gaussian import GaussianFlowMap, GaussianOracle
from imagewright.oracles.markov import MarkovChain, MarkovTokens
from imagewright.oracles.mixture import GaussianMixture, LowRankMixture, Mixture
from imagewright.oracles.tokens import MixtureTokens, ProductMixture

__all__ = [
    "GaussianFlowMap",
    "GaussianMixture",
    "GaussianOracle",
    "IntegratedFlowMap",
    "LowRankMixture",
    "MarkovChain",
    "MarkovTokens",
    "Mixture",
    "MixtureTokens",
    "ProductMixture",
]
