"""Checkpoints of latent diffusion's KL autoencoders (Rombach et al. 2022, arXiv 2112.10752), of which VA-VAE's (Yao et
al. 2025, 2501.01423) is one -> GaussianAutoencoder.

Names of tensors are ours. Shapes tell all sizes but that of the pictures, which published ones have at 256 x 256. What
training files hold beside it is left out: losses, discriminator, the vision network, and the layer that takes latents
to its features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from imagewright.interop.fitting import Source, StateDict, fitted, require_known
from imagewright.models.kl import GaussianAutoencoder
from imagewright.networks import KLAutoencoder, KLAutoencoderConfig
from imagewright.types import UserError

SIDE = 256
"""Of published pictures."""
LEAST = 128
"""Channels below which the released program's groups of normalisation, always 32, are not ours."""
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def from_kl(state: StateDict, config: Mapping[str, Any]) -> GaussianAutoencoder:
    """The autoencoder of a released checkpoint. config: as `KLAutoencoderConfig`'s; `sizes_of` finds all of it."""
    names = ("img_resolution", "in_channels", "latent_channels", "model_channels", "channel_mult", "num_blocks")
    require_known(config, {*names, "attn_resolutions"}, "a KL autoencoder")
    asked = KLAutoencoderConfig.from_json(dict(config))
    if asked.model_channels < LEAST:
        raise UserError(
            f"this autoencoder has {asked.model_channels} channels; below {LEAST} its normalisation differs"
        )
    kept = {key: value for key, value in state.items() if key.startswith(_PARTS)}
    return fitted(lambda: GaussianAutoencoder(KLAutoencoder(asked)), asked.to_json(), kept, _sources)


def sizes_of(state: StateDict) -> dict[str, Any]:
    """The arguments that shapes tell, of pictures of 256 x 256. Raises KeyError or ValueError for another network."""
    blocks = [m for key in state if (m := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.weight", key))]
    levels = range(max(int(m[1]) for m in blocks) + 1)
    channels, pictures = state["encoder.conv_in.weight"].shape[:2]
    widths = [int(state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0]) for level in levels]
    return {
        "img_resolution": SIDE,
        "in_channels": int(pictures),
        "latent_channels": int(state["quant_conv.weight"].shape[0]) // 2,
        "model_channels": int(channels),
        "channel_mult": [width // int(channels) for width in widths],
        "num_blocks": max(int(m[2]) for m in blocks) + 1,
        "attn_resolutions": [SIDE >> n for n in levels if f"encoder.down.{n}.attn.0.q.weight" in state],
    }


def _sources(model: nn.Module) -> dict[str, Source]:
    return {key: Source(key.removeprefix("network.")) for key in model.state_dict()}
