"""Checkpoints of Meta CLIP 2 (Chuang et al. 2025, arXiv 2507.22062): the released program's, and transformers' folders.

Shapes tell the sizes, but for heads and activation: a folder's config.json says them; of the program's own files heads
are those of its configurations, and the activation is to be said with `--config` where it is `quick_gelu`.
A text ends with id 2, as XLM-V's do; CLIPs of other vocabularies are refused. A folder's tokenizer.json stays where it
is. `prompts` in the configuration ({language: {"templates": [...], "classes": [...]}}) make the model name classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagewright import limits
from imagewright.data.words import END, located
from imagewright.files import read_bytes, read_json
from imagewright.interop.fitting import Source, StateDict, fitted, require_known, tensor_of
from imagewright.metrics.vision_transformers import STATISTICS
from imagewright.models.image_text import ImageText, listed
from imagewright.networks.clip import CLIP, CLIPConfig
from imagewright.shapes import brief
from imagewright.types import UserError

MEAN, STD = STATISTICS["clip"]
"""Of OpenAI's CLIP."""
TRANSFORMERS = "metaclip_2"
"""The model_type of a config.json."""
HEAD_WIDTHS = {1280: 80, 1664: 104}
"""Of vision towers by their width; others have 64."""
TEXT_HEAD_WIDTH = 64
_TOPS = {
    "patches.weight": "visual.conv1.weight",
    "first": "visual.class_embedding",
    "places": "visual.positional_embedding",
    "project": "visual.proj",
    "tokens.weight": "token_embedding.weight",
    "text_places": "positional_embedding",
    "text_project": "text_projection",
    "log_scale": "logit_scale",
}
_STARTS = (
    (r"before\.", "visual.ln_pre."),
    (r"after\.", "visual.ln_post."),
    (r"text_after\.", "ln_final."),
    (r"blocks\.", "visual.transformer.resblocks."),
    (r"text_blocks\.", "transformer.resblocks."),
)
_INNER = (
    (r"\.norm0\.", ".ln_1."),
    (r"\.norm1\.", ".ln_2."),
    (r"\.qkv\.", ".attn.in_proj_"),
    (r"\.out\.", ".attn.out_proj."),
    (r"\.up\.", ".mlp.c_fc."),
    (r"\.down\.", ".mlp.c_proj."),
)
_THEIRS = (
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"visual_projection\.weight$", "visual.proj"),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_projection\.weight$", "text_projection"),
)
_THEIR_INNER = (
    (r"\.layer_norm1\.", ".ln_1."),
    (r"\.layer_norm2\.", ".ln_2."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def official_name(ours: str) -> str:
    """The name that a tensor of `CLIP` has in the released checkpoints."""
    return _TOPS.get(ours) or _renamed(_renamed(ours, _STARTS, "^"), _INNER)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...], start: str = "") -> str:
    for pattern, new in pairs:
        name = re.sub(start + pattern, new, name)
    return name


def is_theirs(state: Mapping[str, Any]) -> bool:
    """Whether tensors are named as transformers names them."""
    return "vision_model.embeddings.class_embedding" in state


def as_released(state: StateDict) -> StateDict:
    """Tensors of transformers' names by the released ones: queries, keys and values in one, projections turned."""
    if not is_theirs(state):
        return state
    found: dict[str, Tensor] = {}
    split: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        tensor = tensor_of(name, value)
        if name.endswith(".position_ids"):
            continue
        new = _renamed(_renamed(name, _THEIRS, "^"), _THEIR_INNER)
        if m := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", new):
            split.setdefault(f"{m[1]}.attn.in_proj_{m[3]}", {})[m[2]] = tensor
        else:
            turned = new in ("visual.proj", "text_projection") and tensor.ndim == 2
            found[new] = tensor.mT.contiguous() if turned else tensor
    for name, parts in split.items():
        if {*parts} == {*"qkv"}:
            found[name] = torch.cat([parts[k] for k in "qkv"])
    return found


def from_clip(state: StateDict, config: Mapping[str, Any]) -> ImageText:
    """The encoder of a checkpoint. config: arguments of `CLIPConfig`; words and prompts as `ImageText` has them."""
    more = {name: config[name] for name in ("words", "prompts") if name in config}
    sizes = {name: value for name, value in config.items() if name not in more}
    require_known(sizes, CLIPConfig.__dataclass_fields__, "CLIP")
    asked = CLIPConfig.from_json(sizes)
    prompts = more.get("prompts", {})
    if not isinstance(prompts, Mapping) or not all(isinstance(each, Mapping) for each in prompts.values()):
        raise UserError("config has prompts of another form than {language: {templates, classes}}")
    try:
        told = listed(prompts)
    except (KeyError, TypeError):
        raise UserError("config has prompts without templates or classes") from None

    def make() -> ImageText:
        return ImageText(CLIP(asked), more.get("words", ""), told, MEAN, STD)

    return fitted(make, asked.to_json(), as_released(state), _sources)


def sizes_of(state: StateDict) -> dict[str, Any]:
    """The arguments that shapes tell. Raises KeyError or ValueError for tensors of another network."""
    state = as_released(state)
    width, channels, patch, _ = state["visual.conv1.weight"].shape
    places = int(state["visual.positional_embedding"].shape[0]) - 1
    text_width = int(state["text_projection"].shape[0])
    return {
        "img_resolution": round(places**0.5) * patch,
        "in_channels": int(channels),
        "patch": int(patch),
        "width": int(width),
        "depth": _depth(state, "visual.transformer."),
        "head_width": HEAD_WIDTHS.get(int(width), 64),
        "mlp_ratio": int(state["visual.transformer.resblocks.0.mlp.c_fc.bias"].shape[0]) / int(width),
        "embed": int(state["text_projection"].shape[1]),
        "vocabulary": int(state["token_embedding.weight"].shape[0]),
        "length": int(state["positional_embedding"].shape[0]),
        "text_width": text_width,
        "text_depth": _depth(state, "transformer."),
        "text_heads": max(text_width // TEXT_HEAD_WIDTH, 1),
    }


def _depth(state: StateDict, prefix: str) -> int:
    found = {int(m[1]) for name in state if (m := re.match(rf"{re.escape(prefix)}resblocks\.(\d+)\.", name))}
    return len(found)


def is_folder(folder: Path) -> bool:
    """Whether a folder is one of transformers, of this family."""
    path = folder / "config.json"
    return path.is_file() and read_json(path, dict).get("model_type") == TRANSFORMERS


def told_by_folder(folder: Path) -> dict[str, Any]:
    """What a folder says beside its weights. Raises UserError for texts that end with another id, or a damaged file."""
    path = folder / "config.json"
    config: dict[str, Any] = read_json(path, dict)
    vision, text = config.get("vision_config"), config.get("text_config")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UserError(f"{path} lacks vision_config or text_config")
    if text.get("eos_token_id") != END:
        raise UserError(
            f"{path} has eos_token_id {text.get('eos_token_id')!r}; read are CLIPs whose texts end with {END}"
        )
    names = {"gelu": "exact_gelu", "quick_gelu": "quick_gelu"}
    act, other = vision.get("hidden_act"), text.get("hidden_act")
    if act not in names or other != act:
        raise UserError(f"{path} has hidden_act {brief(act)} and {brief(other)}; both must be gelu or quick_gelu")
    width, heads = (_whole(vision, name, path) for name in ("hidden_size", "num_attention_heads"))
    text_heads = _whole(text, "num_attention_heads", path)
    told: dict[str, Any] = {"activation": names[act], "head_width": width // heads, "text_heads": text_heads}
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        told["words"] = located(tokenizer, sha256(read_bytes(tokenizer, limits.LOG)).hexdigest())
    return told


def _whole(of: Mapping[str, Any], name: str, path: Path) -> int:
    value = of.get(name)
    if not isinstance(value, int) or not 1 <= value <= limits.WHOLE:
        raise UserError(f"{path} is damaged: {name} is {brief(value)}")
    return value


def _sources(model: nn.Module) -> dict[str, Source]:
    return {name: Source(official_name(name.removeprefix("network."))) for name in model.state_dict()}
