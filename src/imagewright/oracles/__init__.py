"""Distributions whose denoiser, score, density and flow are exact: the truth for methods."""

from imagewright.oracles.gaussian import GaussianFlowMap, GaussianMixture, GaussianOracle

__all__ = ["GaussianFlowMap", "GaussianMixture", "GaussianOracle"]
