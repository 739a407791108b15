"""Models and weights of other libraries: in without running their code, out in their formats."""

from imagewright.interop.official import from_official

__all__ = ["from_official"]
