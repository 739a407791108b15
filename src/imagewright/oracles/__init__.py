"""Distributions whose denoiser, score, density and flow are exact: the truth for methods."""
