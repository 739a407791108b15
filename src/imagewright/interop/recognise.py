"""What a file of official weights is: by the names and shapes of its tensors, and for published files by its own name.

The first entry of FORMATS that fits decides; docs/importing.md has them in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from imagewright.interop import clip, kl
from imagewright.interop.lightningdit import told_by
from imagewright.interop.vcmamba import sizes_of
from imagewright.types import UserError

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Format:
    """kind: of `official.KINDS`; None: recognised, and refused for what is `missing`."""

    name: str
    sign: str
    fits: Callable[[State], bool]
    kind: str | None = None
    missing: str = ""


def _has(*names: str) -> Callable[[State], bool]:
    return lambda state: all(name in state for name in names)


def _starts(*prefixes: str) -> Callable[[State], bool]:
    return lambda state: all(any(key.startswith(p) for key in state) for p in prefixes)


FORMATS = (
    Format("EDM2", "unet.emb_fourier.freqs", _has("unet.emb_fourier.freqs"), "edm2"),
    Format("sony/vct", "net.map_layer0 or net.emb_noise", _starts("net.enc.", "net.dec."), "vct"),
    Format("CTM, CIFAR-10", "model.map_layer0_s", _has("model.map_layer0_s.weight"), "ctm-cifar10"),
    Format("EDM, SiD, DMD2's generator", "model.map_layer0", _has("model.map_layer0.weight"), "edm"),
    Format("CTM, ImageNet-64", "time_embed_s.0", _has("time_embed_s.0.weight"), "ctm"),
    Format(
        "guided-diffusion's classifier", "out.2.positional_embedding", _has("out.2.positional_embedding"), None,
        "a classifier as guide",
    ),
    Format(
        "guided-diffusion's upsampler", "input_blocks.0.0 takes six channels",
        lambda s: "input_blocks.0.0.weight" in s and s["input_blocks.0.0.weight"].shape[1:2] == (6,), None,
        "a network that takes a small picture",
    ),
    Format(
        "guided-diffusion", "input_blocks.0.0, and out.2 gives a variance too",
        lambda s: _has("input_blocks.0.0.weight", "out.2.weight")(s) and s["out.2.weight"].shape[:1] == (6,),
        "guided-diffusion",
    ),
    Format(
        "OpenAI's consistency models and their teachers", "input_blocks.0.0",
        _has("input_blocks.0.0.weight", "out.2.weight"), "consistency-models",
    ),
    Format("diffusers' UNet2DModel", "down_blocks.0, conv_in", _has("conv_in.weight", "conv_norm_out.weight"), None,
           "its folder: give the folder with config.json, not the file"),
    Format("LightningDiT", "blocks.0.mlp.w12, x_embedder", _has("blocks.0.mlp.w12.weight", "x_embedder.proj.weight"),
           "lightningdit"),
    Format("DiT, SiT", "final_layer.adaLN_modulation, x_embedder",
           _has("final_layer.adaLN_modulation.1.weight", "x_embedder.proj.weight"), None,
           "what tells both apart; SiT's are read with --kind lightningdit"),
    Format("VAR (DDO's var_*.pth)", "blocks.0.ada_lin", _starts("blocks.0.ada_lin"), None, "the network"),
    Format("VQGAN, LlamaGen's tokenizer", "quantize.embedding, encoder.conv_in",
           _has("quantize.embedding.weight", "encoder.conv_in.weight"), None, "that network (ours is MaskGIT's own)"),
    Format("LDM's KL autoencoders, VA-VAE", "post_quant_conv, encoder.down.0.block",
           _has("post_quant_conv.weight", "encoder.down.0.block.0.conv1.weight"), "kl"),
    Format("ARPG", "layers.self_dec, layers.cross_dec", _starts("layers.self_dec.", "layers.cross_dec."), None,
           "the tokenizer of its tokens, LlamaGen's (the network is here)"),
    Format("LlamaGen", "cls_embedding, layers.0", _starts("cls_embedding", "layers.0."), None, "the network"),
    Format("Meta CLIP 2", "visual.class_embedding, text_projection", _has("visual.class_embedding", "text_projection"),
           "clip"),
    Format("Meta CLIP 2, transformers", "vision_model.embeddings.class_embedding, text_projection",
           _has("vision_model.embeddings.class_embedding", "text_projection.weight"), "clip"),
    Format("VCMamba", "a tensor A_log", lambda s: any(key.endswith(".A_log") for key in s), "vcmamba"),
)  # fmt: skip
"""Formats by what identifies them. MaskGIT's Flax files are msgpack, and are not opened."""


def recognise(state: State) -> Format:
    """The format of a state dict. Raises UserError for one that is unknown, or whose network is not here."""
    for form in FORMATS:
        if form.fits(state):
            if form.kind is None:
                raise UserError(f"these are weights of {form.name}; they are not read: missing is {form.missing}")
            return form
    some = ", ".join(repr(key) for key in list(state)[:3])
    raise UserError(f"no kind of official weights has tensors like {some or 'none'}; --kind names one")


# --- the arguments that shapes tell -------------------------------------------------------------------------


def inferred(kind: str, state: State) -> dict[str, Any]:
    """The configuration as far as tensors' names and shapes tell it: all of it for EDM, EDM2, vct and LightningDiT."""
    try:
        match kind:
            case "edm" | "dmd2" | "ctm-cifar10":
                wrapper = {"precond_class": "EDMPrecond"} if kind == "edm" else {}
                return wrapper | _edm(state, "model.")
            case "edm2":
                logvar = state["logvar_linear.weight"].shape[1]
                return {"logvar_channels": logvar} | _edm2(state, "unet.")
            case "vct":
                sized = _edm2 if "net.emb_fourier.freqs" in state else _edm
                of = {p: {k: v for k, v in state.items() if k.startswith(p)} for p in ("net.", "encoder.")}
                config = sized(of["net."], "net.")
                network = {"SongUNet": "ddpmpp", "DhariwalUNet": "adm"}.get(config.pop("model_type", ""), "edm2")
                encoder = {"encoder": sized(of["encoder."], "encoder.")} if of["encoder."] else {}
                return {"network": network} | config | encoder
            case "lightningdit":
                return told_by(state)
            case "kl":
                return kl.sizes_of(state)
            case "vcmamba":
                return sizes_of(state)
            case "clip":
                return clip.sizes_of(state)
        return {}
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"the tensors of this checkpoint are not those of {kind}: {error}") from None


def _levels(state: State, prefix: str, conv: str) -> tuple[list[int], int, list[int], list[int]]:
    """Resolutions from the largest down, blocks per level, each level's width, resolutions with attention."""
    pattern = re.compile(re.escape(prefix) + r"enc\.(\d+)x\1_block(\d+)\.")
    found = [(int(m[1]), int(m[2])) for key in state if (m := pattern.match(key))]
    if not found:
        raise ValueError("there are no blocks")
    sides = sorted({side for side, _ in found}, reverse=True)
    blocks = max(index for _, index in found) + 1
    widths = [int(state[f"{prefix}enc.{s}x{s}_block{blocks - 1}.{conv}.weight"].shape[0]) for s in sides]
    attention = "attn_qkv" if conv == "conv_res0" else "qkv"
    return sides, blocks, widths, [s for s in sides if f"{prefix}enc.{s}x{s}_block0.{attention}.weight" in state]


def _edm(state: State, prefix: str) -> dict[str, Any]:
    sides, blocks, widths, attends = _levels(state, prefix, "conv0")
    side = sides[0]
    embedding, noise = state[f"{prefix}map_layer0.weight"].shape
    stem, channels = state[f"{prefix}enc.{side}x{side}_conv.weight"].shape[:2]
    song = f"{prefix}dec.{side}x{side}_aux_conv.weight" in state
    base = int(stem) if song else int(noise)
    labels = state.get(f"{prefix}map_label.weight")
    augment = state.get(f"{prefix}map_augment.weight")
    config: dict[str, Any] = {
        "model_type": "SongUNet" if song else "DhariwalUNet",
        "img_resolution": side,
        "img_channels": int(channels),
        "label_dim": 0 if labels is None else int(labels.shape[1]),
        "augment_dim": 0 if augment is None else int(augment.shape[1]),
        "model_channels": base,
        "channel_mult": [width // base for width in widths],
        "channel_mult_emb": int(embedding) // base,
        "num_blocks": blocks,
        "attn_resolutions": attends,
        "dropout": 0.0,
    }
    return config | (_song(state, prefix, int(noise) // base) if song else {})


def _song(state: State, prefix: str, noise_mult: int) -> dict[str, Any]:
    """What tells DDPM++ from NCSN++."""
    residual = any("_aux_residual." in key for key in state)
    skip = any(key.endswith("_aux_skip.weight") for key in state)
    filters = [t for key, t in state.items() if key.endswith(".resample_filter")]
    wide = filters[0].shape[-1] == 4 if filters else residual
    return {
        "embedding_type": "fourier" if f"{prefix}map_noise.freqs" in state else "positional",
        "channel_mult_noise": noise_mult,
        "encoder_type": "residual" if residual else "skip" if skip else "standard",
        "decoder_type": "skip" if sum(key.endswith("_aux_conv.weight") for key in state) > 1 else "standard",
        "resample_filter": [1, 3, 3, 1] if wide else [1, 1],
    }


def _edm2(state: State, prefix: str) -> dict[str, Any]:
    """Balances are the published ones; heads have 64 channels."""
    sides, blocks, widths, attends = _levels(state, prefix, "conv_res0")
    side, base = sides[0], min(widths)
    labels = state.get(f"{prefix}emb_label.weight")
    return {
        "img_resolution": side,
        "img_channels": int(state[f"{prefix}enc.{side}x{side}_conv.weight"].shape[1]) - 1,
        "label_dim": 0 if labels is None else int(labels.shape[1]),
        "model_channels": base,
        "channel_mult": [width // base for width in widths],
        "channel_mult_noise": int(state[f"{prefix}emb_fourier.freqs"].shape[0]) // base,
        "channel_mult_emb": int(state[f"{prefix}emb_noise.weight"].shape[0]) // base,
        "num_blocks": blocks,
        "attn_resolutions": attends,
    }


# --- published files ----------------------------------------------------------------------------------------

_ADM = {
    "attention_resolutions": "32,16,8", "learn_sigma": True, "num_head_channels": 64, "num_res_blocks": 2,
    "resblock_updown": True, "use_scale_shift_norm": True, "num_channels": 256, "noise_schedule": "linear",
}  # fmt: skip
_CM64 = {
    "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "num_head_channels": 64, "class_cond": True,
    "attention_resolutions": "32,16,8", "resblock_updown": True, "use_scale_shift_norm": True,
}  # fmt: skip
_CM256 = _CM64 | {
    "image_size": 256, "num_channels": 256, "num_res_blocks": 2, "class_cond": False, "use_scale_shift_norm": False,
}  # fmt: skip
_LSUN = _ADM | {"image_size": 256, "class_cond": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": _ADM
    | {"image_size": 64, "class_cond": True, "num_channels": 192, "num_res_blocks": 3, "noise_schedule": "cosine",
       "use_new_attention_order": True},
    "128x128_diffusion": {k: v for k, v in _ADM.items() if k != "num_head_channels"}
    | {"image_size": 128, "class_cond": True, "num_heads": 4},
    "256x256_diffusion": _ADM | {"image_size": 256, "class_cond": True},
    "256x256_diffusion_uncond": _ADM | {"image_size": 256, "class_cond": False},
    "512x512_diffusion": _ADM | {"image_size": 512, "class_cond": True},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": _LSUN,
    "edm_imagenet64_ema": _CM64 | {"training_mode": "edm"},
    "cd_imagenet64_l2": _CM64,
    "cd_imagenet64_lpips": _CM64,
    "ct_imagenet64": _CM64 | {"training_mode": "consistency_training"},
    **{f"edm_{place}256_ema": _CM256 | {"training_mode": "edm"} for place in ("bedroom", "cat")},
    **{f"cd_{place}256_{norm}": _CM256 for place in ("bedroom", "cat") for norm in ("l2", "lpips")},
    **{f"ct_{place}256": _CM256 | {"training_mode": "consistency_training"} for place in ("bedroom", "cat")},
}  # fmt: skip
"""Flags of OpenAI's published checkpoints by their files' names, from both programs' READMEs and launch scripts."""
CTM = _CM64
"""CTM's one published network."""
