"""The lock of a run's folder, and errors of disks as one line."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.process import folder as process_folder
from megatron_rl.process.folder import (
    LOCK_FILE,
    check_new_folder,
    check_temporary_folder,
    disk_problem,
    hold_folder,
    is_held_by_another,
)

HOLDER = """
import sys
from pathlib import Path
from megatron_rl.process.folder import hold_folder
hold_folder(Path(sys.argv[1]), "run_dir=x")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _no_lock_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    monkeypatch.setattr(process_folder, "_held", held)
    monkeypatch.delenv(process_folder.AGENT_VARIABLE, raising=False)


def hold(folder: Path) -> None:
    hold_folder(folder, f"run_dir={folder}")


def start_holder(folder: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_has_one_holder_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    holder = start_holder(folder)
    try:
        for _ in range(2):
            with pytest.raises(ConfigError) as caught:
                hold(folder)
            message = str(caught.value)
            assert message.startswith(f"run_dir={folder}: expected a folder that no running proc")
            assert f"by process {holder.pid} on host {os.uname().nodename};" in message
        assert is_held_by_another(folder)
    finally:
        holder.send_signal(signal.SIGKILL)  # the kernel frees the lock, however a process ends
        holder.wait()
    assert not is_held_by_another(folder)
    hold(folder)
    assert not is_held_by_another(folder)
    assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_folder_is_the_same_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    holder = start_holder(folder)
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    try:
        for name in ("run", "link", "run/../run"):
            with pytest.raises(ConfigError, match=f"run_dir={name}: .* process {holder.pid} on"):
                hold(Path(name))
    finally:
        holder.kill()
        holder.wait()


def test_ranks_of_one_launch_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(process_folder.AGENT_VARIABLE, str(tmp_path / "a" / "attempt_0" / "0" / "e"))
    hold(tmp_path)
    monkeypatch.setenv(process_folder.AGENT_VARIABLE, str(tmp_path / "a" / "attempt_0" / "1" / "e"))
    assert not is_held_by_another(tmp_path)
    monkeypatch.setenv(process_folder.AGENT_VARIABLE, str(tmp_path / "b" / "attempt_0" / "1" / "e"))
    assert is_held_by_another(tmp_path)
    monkeypatch.delenv(process_folder.AGENT_VARIABLE)
    assert is_held_by_another(tmp_path)
    assert not is_held_by_another(tmp_path / "nothing here")


def test_a_disk_that_cannot_lock_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(process_folder.fcntl, "flock", refuse)
    hold(tmp_path)
    assert "cannot be locked (No locks available): see to it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        ("file", "File exists: {}; choose a path that is not taken by a file"),
        ("file/run", "Not a directory: {}; choose a path whose parents are folders"),
        ("/proc/nowhere", "No such file or directory: {}; choose a path that can be created"),
        ("x" * 300, "File name too long: {}; choose a shorter path"),
        ("full", "No space left on device: its disk; free some space there"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path: Path, path: str, fragment: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / LOCK_FILE).symlink_to("/dev/full")
    folder = tmp_path / path
    with pytest.raises(ConfigError) as caught:
        hold(folder)
    assert str(caught.value) == (
        f"run_dir={folder}: expected a folder that can be written, got " + fragment.format(folder)
    )


def test_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this user may not mount a file system")
    expected = "Read-only file system: .*; choose a folder on a disk that can be written"
    try:
        with pytest.raises(ConfigError, match=expected):
            hold(disk / "run")
        with pytest.raises(ConfigError, match=expected):
            check_new_folder(disk / "out", "warm_start.output=a")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("path", "fragment"),
    [
        ("file", "File exists: {}; choose a path that is not taken by a file"),
        ("file/out", "File exists: {parent}; choose a path that is not taken by a file"),
        ("file/a/out", "Not a directory: {parent}; choose a path whose parents are folders"),
        ("/proc/nowhere/out", "No such file or directory: {parent}; choose a path that can be"),
        ("loop/a/out", "Too many levels of symbolic links: {parent}; choose a path without a"),
    ],
)
def test_a_folder_that_could_not_be_made_later(tmp_path: Path, path: str, fragment: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    folder = tmp_path / path
    with pytest.raises(ConfigError) as caught:
        check_new_folder(folder, "warm_start.output=a")
    expected = fragment.format(folder, parent=folder.parent)
    assert f"warm_start.output=a: expected a folder that can be written, got {expected}" in str(
        caught.value
    )
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_can_be_made_later_is_not_made_now(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "a" / "out", "warm_start.output=a")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    (tmp_path / "a" / "out").mkdir()
    check_new_folder(tmp_path / "a" / "out", "warm_start.output=a")  # which is then replaced


@pytest.mark.parametrize(
    ("folder", "fragment"),
    [
        (
            "/" + "x" * 70,
            "expected a path of at most 70 bytes, since sockets are made there, got 71",
        ),
        ("/" + "\u00e4" * 35, "got 71"),  # bytes, not characters
        ("/tmp/a b", "expected a path without blanks"),
    ],
)
def test_a_temporary_folder_that_does_not_suit(
    folder: str, fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 69)
    check_temporary_folder()
    monkeypatch.setattr(tempfile, "tempdir", folder)
    with pytest.raises(ConfigError, match=f"TMPDIR={folder}: .*{fragment}"):
        check_temporary_folder()


def test_no_temporary_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    with pytest.raises(ConfigError, match="TMPDIR: expected a folder for temporary files that can"):
        check_temporary_folder()


def error_of(work: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        work()
    return caught.value


def write_full() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


def raise_wrapped() -> None:
    try:
        write_full()
    except OSError as error:
        raise RuntimeError("of a library") from error


def open_too_many() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
    files = []
    try:
        for _ in range(64):
            files.append(open("/dev/null"))  # noqa: SIM115
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_beyond_the_limit(path: Path) -> None:
    """A limit on the size of files; safetensors tells of it in its own words."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        save_file({"x": torch.zeros(4096)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_a_user_can_mend_is_one_line(tmp_path: Path) -> None:
    assert disk_problem(error_of(write_full)).endswith(
        "No space left on device; free some space there"
    )
    assert "No space left" in disk_problem(error_of(raise_wrapped))
    assert "raise the limit on open files (ulimit -n)" in disk_problem(error_of(open_too_many))
    too_large = error_of(lambda: write_beyond_the_limit(tmp_path / "large.safetensors"))
    assert "raise the limit on the size of a file (ulimit -f)" in disk_problem(too_large)
    (tmp_path / "file").write_text("")
    below_a_file = disk_problem(error_of(lambda: (tmp_path / "file" / "x").write_text("")))
    assert below_a_file == (
        f"{tmp_path}/file/x: Not a directory; choose a path whose parents are folders"
    )


@pytest.mark.parametrize(
    "error", [ValueError("x"), DataError("y"), FileNotFoundError(2, "no", "f"), OSError("text")]
)
def test_other_errors_keep_their_traceback(error: BaseException) -> None:
    assert disk_problem(error) == ""
