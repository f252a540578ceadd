"""The run's bearer token in a file that only its owner may read."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from megatron_rl.errors import ConfigError

TOKEN_FILE = "engine_token"  # in run_dir


def token_in(path: Path) -> str:
    """The token in a file. If there is no file, it is created with a random token.

    Raises:
        ConfigError: others may read the file, or it is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _create(path)
    token = path.read_text().strip()
    if not token or stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(
            f"{path}: expected a token in a file of mode 0600, got "
            f"{len(token)} characters and mode {stat.S_IMODE(path.stat().st_mode):04o}; "
            "delete it, and a new one is drawn"
        )
    return token


def _create(path: Path) -> None:
    """Write the file whole, unless another process does so at the same time."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    with contextlib.suppress(FileExistsError):
        os.link(hidden, path)
    hidden.unlink()
