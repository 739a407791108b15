"""Ways to draw: frozen dataclasses of settings, called with a model and latents. They know the protocols only."""

from imagewright.samplers.ablation import Ablation
from imagewright.samplers.acceleration import Accelerated
from imagewright.samplers.addim import ADDIM
from imagewright.samplers.ancestral import Ancestral
from imagewright.samplers.bespoke import Bespoke
from imagewright.samplers.bit_diffusion import BitDiffusion
from imagewright.samplers.consistency import MultistepConsistency
from imagewright.samplers.ddim import DDIM
from imagewright.samplers.dpm_solver import DPMSolverPlusPlus
from imagewright.samplers.edm import Euler, Heun
from imagewright.samplers.euler_maruyama import EulerMaruyama
from imagewright.samplers.jumps import Jumps
from imagewright.samplers.masked_decoding import MaskedDecoding
from imagewright.samplers.randomized_parallel import RandomizedParallel
from imagewright.samplers.raster import Raster
from imagewright.samplers.restart import PRESETS as _RESTART
from imagewright.samplers.restart import Restart
from imagewright.samplers.straight import Straight
from imagewright.samplers.unipc import UniPC

SAMPLERS = {
    "ablation": Ablation,
    "accelerated": Accelerated,
    "addim": ADDIM,
    "ancestral": Ancestral,
    "bespoke": Bespoke,
    "bit-diffusion": BitDiffusion,
    "ddim": DDIM,
    "dpm-solver++": DPMSolverPlusPlus,
    "euler": Euler,
    "euler-maruyama": EulerMaruyama,
    "heun": Heun,
    "jumps": Jumps,
    "masked-decoding": MaskedDecoding,
    "multistep-consistency": MultistepConsistency,
    "randomized-parallel": RandomizedParallel,
    "raster": Raster,
    "restart": Restart,
    "straight": Straight,
    "unipc": UniPC,
}
"""Every sampler by its name on the command line."""

PRESETS = {f"restart-{name}": sampler for name, sampler in _RESTART.items()}
"""Published settings by their name on the command line."""

__all__ = [
    "ADDIM",
    "DDIM",
    "PRESETS",
    "SAMPLERS",
    "Ablation",
    "Accelerated",
    "Ancestral",
    "Bespoke",
    "BitDiffusion",
    "DPMSolverPlusPlus",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Jumps",
    "MaskedDecoding",
    "MultistepConsistency",
    "RandomizedParallel",
    "Raster",
    "Restart",
    "Straight",
    "UniPC",
]
