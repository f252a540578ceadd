"""A flipped byte of a checkpoint is found, and the file named."""

from __future__ import annotations

import hashlib
import random
import subprocess
from pathlib import Path

import pytest

from megatron_rl.errors import DataError
from megatron_rl.learner.model.checkpoint_sums import (
    SUMS,
    check_sums,
    file_sum,
    read_sums,
    sums_text,
    wrong_file,
)

FILES = {"__0_0.distcp": 40_000, ".metadata": 900, "run_state.json": 300, "common.pt": 1_200}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder of files with their sums."""
    rng = random.Random(3)
    for name, size in FILES.items():
        (tmp_path / name).write_bytes(rng.randbytes(size))
    sums = {name: file_sum(tmp_path / name) for name in FILES}
    (tmp_path / SUMS).write_text(sums_text(sums))
    return tmp_path


def test_the_sums_are_those_of_sha256sum(checkpoint: Path) -> None:
    assert file_sum(checkpoint / "common.pt") == (
        hashlib.sha256((checkpoint / "common.pt").read_bytes()).hexdigest()
    )
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=checkpoint, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count(": OK") == len(FILES)
    check_sums(checkpoint)


def test_a_hundred_flipped_bits_are_found_and_named(checkpoint: Path) -> None:
    rng = random.Random(5)
    names = [*FILES, SUMS]
    for number in range(100):
        path = checkpoint / names[number % len(names)]
        whole = path.read_bytes()
        position = rng.randrange(len(whole))
        flipped = bytes([whole[position] ^ (1 << rng.randrange(8))])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        with pytest.raises(DataError) as caught:
            check_sums(checkpoint)
        assert path.name in str(caught.value), (path.name, position)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    check_sums(checkpoint)


@pytest.mark.parametrize("change", ["longer", "shorter", "missing", "a folder"])
def test_other_damage_is_named(change: str, checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    if change == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    if change == "a folder":
        path.mkdir()
    problem = wrong_file(checkpoint, read_sums(checkpoint) or {}, sorted(FILES))
    expected = {"missing": "is missing", "a folder": "cannot be read (Is a directory)"}
    assert problem is not None
    assert problem.startswith(f"__0_0.distcp {expected.get(change, 'is damaged')}")


def test_sums_of_other_folders_are_not_followed(checkpoint: Path) -> None:
    """`../` in a name of SHA256SUMS, even if its own sum is right."""
    (checkpoint / SUMS).write_text(sums_text({"../secret": "0" * 64}))
    with pytest.raises(DataError, match="is not as it was written"):
        read_sums(checkpoint)


def test_a_checkpoint_of_an_older_release_has_none(checkpoint: Path) -> None:
    (checkpoint / SUMS).unlink()
    assert read_sums(checkpoint) is None
    check_sums(checkpoint)
