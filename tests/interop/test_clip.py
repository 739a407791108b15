"""Folders of transformers' Meta CLIP 2: the same embeddings of pictures and texts on equal weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from imagewright.interop.reading import read_official
from imagewright.models.view import seen
from imagewright.types import UserError

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": 6}
    config = transformers.MetaClip2Config(
        text_config={**shared, "vocab_size": 20, "hidden_size": 12, "intermediate_size": 48, "num_attention_heads": 3,
                     "max_position_embeddings": 7, "eos_token_id": 2, "pad_token_id": 1},
        vision_config={**shared, "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 8,
                       "patch_size": 4},
        projection_dim=6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MetaClip2Model(config).eval()
    path = tmp_path_factory.mktemp("folder")
    model.save_pretrained(str(path))
    return path


def test_a_folder_gives_the_same_embeddings(folder: Path) -> None:
    found = read_official(folder, name="metaclip2-tiny")
    theirs = transformers.MetaClip2Model.from_pretrained(str(folder)).eval()
    assert (found.kind, found.spec.name, found.spec.resolution) == ("clip", "metaclip2-tiny", 8)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    tokens = torch.tensor([[5, 9, 2, 1, 1, 1, 1], [4, 3, 8, 7, 6, 5, 2], [2, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        made = theirs(pixel_values=seen(images, found.model.view), input_ids=tokens)
        pictures, texts = found.model.encode(images).pooled, found.model.network.text(tokens)
    for ours, their in ((pictures, made.image_embeds), (texts, made.text_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(ours, dim=1), their, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.model.logits(pictures, texts), made.logits_per_image, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="without the tokenizer"):
        found.model.texts(["a cat"])


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [("eos_token_id", 19, "has eos_token_id 19"), ("hidden_act", "relu", "hidden_act"),
     ("num_attention_heads", 0, "num_attention_heads is 0")],
)  # fmt: skip
def test_other_folders_are_refused_in_a_sentence(
    folder: Path, tmp_path: Path, what: str, value: object, said: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][what] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        read_official(tmp_path)
