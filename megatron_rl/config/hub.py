"""Finds models and data sets that are in the Hugging Face hub's local cache. Nothing is downloaded.

The cache is that of huggingface_hub: HF_HUB_CACHE, or `hub` in HF_HOME.
"""

from __future__ import annotations

from pathlib import Path


def cached_folder(name: str, *, kind: str = "model") -> str:
    """The folder of the cache that holds what `main` was when it was fetched; "" if there is none,
    or if `name` is a path that exists.

    Args:
        name: such as Qwen/Qwen3-0.6B.
        kind: "model" or "dataset".
    """
    if not is_name(name):
        return ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(name, repo_type=kind, local_files_only=True)
    except LocalEntryNotFoundError:
        return ""


def model_folder(path: str) -> str:
    """The folder of a model that a setting or an argument names: the one in the cache if `path` is
    the name of a model that is there, and otherwise `path`.
    """
    return cached_folder(path) or path


def how_to_fetch(name: str, *, kind: str = "model") -> str:
    """The end of a message on a path that does not exist: where else it was looked for, and the
    command that fetches it. "" if `name` is a path that exists, or cannot be a name.
    """
    if not is_name(name):
        return ""
    from huggingface_hub.constants import HF_HUB_CACHE

    option = "" if kind == "model" else f" --repo-type {kind}"
    return (
        f", nor {name} in the hub's cache {HF_HUB_CACHE}; if it is a name on the Hugging Face hub, "
        f"fetch it with: hf download {name}{option}"
    )


def is_name(path: str) -> bool:
    """Whether it can be the name of a model or data set, OWNER/NAME, and is not a path here."""
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or Path(path).exists():
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True
