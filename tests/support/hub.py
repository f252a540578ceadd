"""A hub cache of a test's own, with what the hub's own client leaves of a download."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache; the working directory becomes one without files."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fetched(hub: Path, kind: str, name: str, files: dict[str, bytes]) -> Path:
    """The snapshot of a repository in the cache: blobs, links to them, and a ref.

    Args:
        kind: "model" or "dataset".
        files: contents by name.
    """
    folder = hub / f"{kind}s--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for place in (folder / "blobs", folder / "refs", snapshot):
        place.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for number, (file, content) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def fetched_model(hub: Path, name: str, model: Path) -> Path:
    """The snapshot of a model whose files are those of a folder."""
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    return fetched(hub, "model", name, files)
