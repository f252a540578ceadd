"""The sums of a checkpoint's files: SHA-256 of each, in a file `SHA256SUMS` beside them, in the
format of `sha256sum`, which can check them too:

    cd runs/a/checkpoints/step_000012 && sha256sum --check --quiet SHA256SUMS

Its last line is a comment with the sum of the lines above it, so that the file is covered as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_rl.errors import DataError

SUMS = "SHA256SUMS"
_OWN = "# sha256 of the lines above: "


def file_sum(path: Path) -> str:
    """The SHA-256 of a file, read in pieces, as 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_text(sums: Mapping[str, str]) -> str:
    """The contents of SHA256SUMS for the sums by file name."""
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return f"{lines}{_OWN}{hashlib.sha256(lines.encode()).hexdigest()}\n"


def read_sums(folder: Path) -> dict[str, str] | None:
    """The sums by file name; None if the checkpoint has none, as those of older releases.

    Raises:
        DataError: SHA256SUMS is not as it was written.
    """
    path = folder / SUMS
    try:
        text = path.read_bytes().decode("ascii")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    lines = text.splitlines()[:-1]
    sums = {line[66:]: line[:64] for line in lines}
    if sums_text(sums) != text or any(Path(name).name != name for name in sums):
        raise DataError(f"{path}: is not as it was written")
    return sums


def wrong_file(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> str | None:
    """What is wrong with the first of the named files that is not as it was written, in words that
    begin with its name; None if all are.

    Args:
        sums: by file name, of `read_sums`.
    """
    for name in names:
        try:
            found = file_sum(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != sums[name]:
            return f"{name} is damaged (its SHA-256 is {found[:12]}..., not {sums[name][:12]}...)"
    return None


def check_sums(folder: Path) -> None:
    """Check every file of a checkpoint that has sums.

    Raises:
        DataError: naming the first file that is not as it was written.
    """
    sums = read_sums(folder)
    problem = None if sums is None else wrong_file(folder, sums, sorted(sums))
    if problem is not None:
        raise DataError(
            f"checkpoint {folder}: expected files as they were written, got: {problem}; use "
            "another checkpoint"
        )
