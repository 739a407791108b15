"""Models on a hub of model repositories (huggingface_hub, an extra): `push`, and `load("hub:owner/name")`.

Only the files of a model folder travel: model.json, model.safetensors, README.md. What comes back is read as any other
folder from strangers: no code, held against its own description.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from imagewright.models.files import ModelFile, load_model, read_model_record
from imagewright.types import UserError

PREFIX = "hub:"
FILES = ("model.json", "model.safetensors", "README.md")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,100})?")


def push(folder: Path, name: str, *, private: bool = False, hub: Any = None) -> str:
    """Upload a model folder to "owner/name", which is made where there is none; returns its address.

    hub: what has huggingface_hub's `create_repo` and `upload_folder`; None = the library itself.
    Raises UserError for a folder without a model, another name, and where the hub refuses.
    """
    _require_name(name, revision=False)
    read_model_record(folder)
    api = _library() if hub is None else hub
    with_message = {"repo_id": name, "repo_type": "model"}
    try:
        api.create_repo(**with_message, private=private, exist_ok=True)
        made = api.upload_folder(**with_message, folder_path=str(folder), allow_patterns=list(FILES))
    except Exception as error:  # of a library and of networks: any
        raise UserError(f"{name} could not be pushed: {_sentence(error)}") from None
    return str(made)


def load_from_hub(name: str, *, hub: Any = None) -> ModelFile:
    """The model of "hub:owner/name", or of one revision of it, "hub:owner/name@revision".

    Raises UserError for another name, where the hub has no such model, and for a damaged one.
    """
    name = name.removeprefix(PREFIX)
    _require_name(name, revision=True)
    repository, _, revision = name.partition("@")
    api = _library() if hub is None else hub
    try:
        folder = api.snapshot_download(repo_id=repository, revision=revision or None, allow_patterns=list(FILES[:2]))
    except Exception as error:
        raise UserError(f"{PREFIX}{name} could not be loaded: {_sentence(error)}") from None
    return load_model(Path(folder))


def _require_name(name: str, *, revision: bool) -> None:
    if not _NAME.fullmatch(name) or ("@" in name and not revision):
        raise UserError(f"{name!r} is no name on a hub; it must be owner/name")


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("a hub is reached through an extra: pip install 'imagewright[hub]'") from None
    return huggingface_hub


def _sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
