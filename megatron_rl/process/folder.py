"""Folders that a command writes: one process holds a run's folder, so that no two runs write it.

The lock is a `flock` on a file in the folder. The kernel frees it when the process ends, however it
ends. The file says which process holds it, for the message that another one gets.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.errors import ConfigError

LOCK_FILE = ".in_use"
# What a user can mend when a file cannot be written, and how.
MENDABLE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the host's limit on open files (fs.file-max)",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "choose a folder that this user may write",
    errno.EPERM: "choose a folder that this user may write",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EISDIR: "choose a path that is no folder",
    errno.EEXIST: "choose a path that is not taken by a file",
    errno.ENOENT: "choose a path that can be created",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "choose a path without a circle of links",
}
# Those that mean the same wherever they happen. A file that is missing, say, may be a mistake here.
_ANYWHERE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EROFS)
_ANYWHERE += (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_IN_A_TEXT = re.compile(r"\(os error (\d+)\)")  # how safetensors tells of one
# Sockets are made in the temporary folder, and Linux limits their paths (sun_path in linux/un.h).
# The longest name is that of vLLM's: "/" and a UUID.
MAX_SOCKET_PATH = 107
SOCKET_NAME = 37
AGENT_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # <folder of the launch>/attempt_<n>/<local rank>/...

_held: list[int] = []  # descriptors of the locks; open until the process ends


def hold_folder(folder: Path, setting: str) -> None:
    """Create a folder, readable by its owner alone, and hold it until this process ends. A folder
    that is there keeps its mode.

    Args:
        setting: the setting and its value, for messages: "run_dir=runs/a".

    Raises:
        ConfigError: another process holds it, or it cannot be created or written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{setting}: expected a folder that can be written, got {_brief(error)}"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        holder = _holder(folder)
        raise ConfigError(
            f"{setting}: expected a folder that no running process uses, got one in use by process "
            f"{holder.get('pid', '?')} on host {holder.get('host', '?')}; wait for its end, or "
            "choose another folder"
        ) from None
    except OSError as error:  # some file systems cannot lock
        print(
            f"{setting}: cannot be locked ({error.strerror}): see to it that no other run uses it",
            file=sys.stderr,
        )
    _held.append(lock)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "launch": _launch()}
        os.ftruncate(lock, os.pwrite(lock, json.dumps(holder).encode(), 0))
        os.fsync(lock)
    except OSError as error:
        raise ConfigError(
            f"{setting}: expected a folder that can be written, got {_brief(error)}"
        ) from error


def check_new_folder(folder: Path, setting: str) -> None:
    """Check that a folder that is written later can be made then; its parent is made now.

    Args:
        setting: the setting and its value, for messages.

    Raises:
        ConfigError: its place is taken by a file, or its parent cannot be made or written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        with tempfile.TemporaryFile(dir=folder.parent) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise ConfigError(
            f"{setting}: expected a folder that can be written, got {_brief(error)}"
        ) from error


def is_held_by_another(folder: Path) -> bool:
    """Whether a process of another launch holds the folder; the ranks that one torchrun started on
    this host are one launch.
    """
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(folder).get("launch") != _launch()
    except OSError:
        return False
    finally:
        os.close(lock)
    return False


def check_temporary_folder() -> None:
    """Raise ConfigError if the temporary folder does not suit engines and libraries."""
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        raise ConfigError(
            f"TMPDIR: expected a folder for temporary files that can be written, got {error}"
        ) from error
    longest = MAX_SOCKET_PATH - SOCKET_NAME
    if len(os.fsencode(folder)) > longest:
        raise ConfigError(
            f"TMPDIR={folder}: expected a path of at most {longest} bytes, since sockets are made "
            f"there, got {len(os.fsencode(folder))}; set TMPDIR to a shorter one"
        )
    if re.search(r"\s", folder):
        raise ConfigError(
            f"TMPDIR={folder}: expected a path without blanks, since compilers are called with it; "
            "set TMPDIR to another folder"
        )


def disk_problem(error: BaseException) -> str:
    """One line on an error that means a disk is full, a file cannot be written or a limit of the
    system is reached, which the user can mend; "" for every other error.
    """
    for each in _chain(error):
        code = each.errno if isinstance(each, OSError) else None
        if code is None and (found := _IN_A_TEXT.search(str(each))):
            code = int(found[1])
        if code in _ANYWHERE:
            assert code is not None
            names = [os.fsdecode(name) for name in (getattr(each, "filename", None),) if name]
            where = names or _full_folders() or ["a file"]
            return f"{', '.join(where)}: {os.strerror(code)}; {MENDABLE[code]}"
    return ""


def _full_folders() -> list[str]:
    """Mount points of this process without space, of those that are written to in a run."""
    folders = [os.getcwd(), tempfile.gettempdir(), "/dev/shm", *map(_folder_of, _held)]
    return sorted({folder for folder in folders if os.path.isdir(folder) and _is_full(folder)})


def _is_full(folder: str) -> bool:
    space = os.statvfs(folder)
    return space.f_blocks > 0 and space.f_bavail * space.f_frsize < 2**16


def _folder_of(descriptor: int) -> str:
    return os.path.dirname(os.readlink(f"/proc/self/fd/{descriptor}"))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _brief(error: OSError) -> str:
    path = error.filename or "its disk"
    advice = MENDABLE.get(error.errno or 0, "choose another folder")
    return f"{error.strerror}: {path}; {advice}"


def _holder(folder: Path) -> dict[str, object]:
    try:
        return dict(json.loads((folder / LOCK_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # written by nobody yet


def _launch() -> str:
    """The same for all ranks that one torchrun started on this host."""
    if AGENT_VARIABLE in os.environ:
        return str(Path(os.environ[AGENT_VARIABLE]).parents[1])
    return f"process {os.getpid()}"
