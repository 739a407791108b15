"""Models as earlier versions described them: today's classes build them with the same tensors.

`earlier_descriptions.json` holds products of recipes, described by the code of the commit `at`, with a digest of the
names, number types and shapes of their tensors: where a network gets a new setting, old weights must fit as before.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from imagewright.models.description import build

KNOWN = json.loads((Path(__file__).parent / "earlier_descriptions.json").read_text())


def test_what_was_described_is_built_with_the_same_tensors() -> None:
    for known in KNOWN:
        with torch.device("meta"):
            state = build(known["model"]).state_dict()
        names = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items())
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
        assert (len(names), digest) == (known["tensors"], known["state"]), (known["recipe"], known["at"])
