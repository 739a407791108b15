"""Ways to draw: frozen dataclasses of settings, called with a model and latents. They know the protocols only."""

from imagewright.samplers.ablation import Ablation
from imagewright.samplers.consistency import MultistepConsistency
from imagewright.samplers.edm import Euler, Heun

SAMPLERS = {
    "ablation": Ablation,
    "euler": Euler,
    "heun": Heun,
    "multistep-consistency": MultistepConsistency,
}
"""Every sampler by its name on the command line."""

__all__ = ["SAMPLERS", "Ablation", "Euler", "Heun", "MultistepConsistency"]
