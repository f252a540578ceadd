"""Transformer Engine's pure-Python part in a folder of its own, installed once and kept.

Its wheel is for every platform and contains no CUDA code; `tests/support/compiled_part.py` stands
in for what would be compiled. The folder is below `.cache/`, which git ignores, and is made anew
when requirements/te-names.txt changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.ranks import ROOT

REQUIREMENTS = ROOT / "requirements" / "te-names.txt"
FOLDER = ROOT / ".cache" / "te"


def packages() -> Path:
    """The folder with the packages; installs them if they are not there."""
    fingerprint = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    folder = FOLDER / fingerprint
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of a test session may ask
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            command += ["--no-compile", "--disable-pip-version-check"]
            subprocess.run(
                [*command, "--target", str(partial), "-r", str(REQUIREMENTS)], check=True
            )
            partial.rename(folder)
    return folder
