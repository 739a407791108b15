"""Reading a state dict written by `torch.save` without executing the pickle inside it: see `pickles`.

Source     the layouts written by torch.save: a zip archive with `data.pkl` and `data/<key>` (since torch
           1.6), and the older sequence of pickles followed by raw storages.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from imagewright.arrays import require_finite
from imagewright.files import open_regular
from imagewright.pickles import (
    Refused,
    Vocabulary,
    describe,
    open_legacy,
    open_zip,
    refusing,
    tensors_of,
    word,
)


def read_state_dict(
    path: Path, key: str | None = None, words: type[Vocabulary] = Vocabulary, *, option: str = ""
) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d state dict, by name, on the CPU.

    key: where it lies in a file of several, such as "ema", or "state.ema" for a dictionary in another.
    words: what the pickle may ask for; by default OrderedDict, the plain storages and the tensor rebuild functions.
    option: of the command, with which a user says the key; "" = there is none.
    Raises UserError naming the file when it is missing, damaged, no flat dictionary of tensors, or asks for more.
    """
    with open_regular(path) as file, refusing(path, "torch.save file"):
        state = _read(file, key, words(), option)
    require_finite(path, state)
    return state


def _read(file: BinaryIO, key: str | None, words: Vocabulary, option: str) -> dict[str, Tensor]:
    size = file.seek(0, 2)
    file.seek(0)
    state, read = open_zip(file, words) if zipfile.is_zipfile(file) else open_legacy(file, words)
    for part in key.split(".") if key else ():
        if not isinstance(state, dict) or part not in state:
            raise Refused(f"it has no {key!r}; {_keys(state)}")
        state = state[part]
    if not isinstance(state, dict):
        raise Refused(f"its content is no dictionary of tensors but {describe(state)}")
    nested = [name for name, value in state.items() if isinstance(value, dict) and value]
    if nested:
        there, way = ", ".join(map(word, nested[:10])), f"; name one with {option}" if option else ", not tensors alone"
        raise Refused(f"it holds several dictionaries{way}: {there}")
    return tensors_of(state, read, size)


def _keys(state: Any) -> str:
    if not isinstance(state, dict):
        return f"there is {describe(state)}"
    return f"there are {', '.join(word(name) for name in list(state)[:10]) or 'none'}"
