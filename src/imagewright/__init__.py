"""imagewright: train, distil, accelerate and measure image generators."""

__version__ = "0.1.0"
