"""Gaussian paths: processes, conversions between them, time grids and training noise levels."""
