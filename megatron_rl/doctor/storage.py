"""Checks of the run's folder, the clock, limits and shared memory."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.doctor.findings import Finding, failed, passed, warned
from megatron_rl.errors import ConfigError
from megatron_rl.process.folder import check_temporary_folder

# File systems that several hosts can share.
SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "glusterfs", "9p", "virtiofs"}
SHARED |= {"wekafs", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs", "fuse.s3fs", "afs", "panfs"}
MAX_SKEW_SECONDS, WRONG_SKEW_SECONDS = 1.0, 60.0
FEW_FILES, WANTED_FILES = 1024, 16384
SHARED_MEMORY = Path("/dev/shm")
NEEDED_SHARED_MEMORY = 2**30  # docker gives 64 MiB unless it is told


def existing_parent(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def check_folder(config: Config, *, num_nodes: int, mounts: Path = Path("/proc/mounts")) -> Finding:
    """Whether the run's folder can be written, and is shared where there are several nodes."""
    place = existing_parent(Path(config.run_dir))
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        check_temporary_folder()
    except (OSError, ConfigError) as error:
        return failed(
            "folder", f"run_dir={config.run_dir}: expected one that can be written, got {error}"
        )
    kind, free = file_system(place, mounts), shutil.disk_usage(place).free
    text = f"run_dir={config.run_dir} on {kind}, {free / 1e9:.0f} GB free"
    if num_nodes > 1 and kind not in SHARED:
        return failed(
            "folder",
            f"{text}: expected a file system that all {num_nodes} nodes share, got a local one; "
            "choose another run_dir",
        )
    return passed("folder", text)


def file_system(folder: Path, mounts: Path) -> str:
    """The type of the file system that holds a folder."""
    best, kind = "", "an unknown file system"
    for line in mounts.read_text().splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def check_clock(config: Config) -> Finding:
    """This host's clock beside that of the file system, which other hosts see too."""
    place = existing_parent(Path(config.run_dir))
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            before = time.time()
            os.utime(file.name)
            after, stamp = time.time(), os.stat(file.name).st_mtime
    except OSError as error:
        return warned("clock", f"not compared with {place}: {error.strerror}")
    return judge_skew(max(before - stamp, stamp - after, 0.0))


def judge_skew(seconds: float) -> Finding:
    """The finding on a clock that differs from the file system's by so much."""
    text = f"{seconds:.2f} s from the clock of run_dir's file system"
    if seconds > WRONG_SKEW_SECONDS:
        return failed("clock", f"{text}: expected at most {WRONG_SKEW_SECONDS:g}; set it (NTP)")
    if seconds > MAX_SKEW_SECONDS:
        return warned("clock", f"{text}: times of different hosts cannot be compared")
    return passed("clock", text)


def check_limits() -> Finding:
    """The limits on open files, and on locked memory for RDMA."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return judge_limits(files, locked, has_rdma=Path("/sys/class/infiniband").is_dir())


def judge_limits(files: int, locked: int, *, has_rdma: bool) -> Finding:
    """The finding on these limits; -1 is none."""
    text = f"open files {'unlimited' if files < 0 else files}"
    if 0 <= files < FEW_FILES:
        return failed("ulimits", f"{text}: expected at least {FEW_FILES}; raise it (ulimit -n)")
    if has_rdma and locked >= 0:
        return warned(
            "ulimits", f"{text}, locked memory {locked}: RDMA wants unlimited (ulimit -l)"
        )
    if 0 <= files < WANTED_FILES:
        return warned("ulimits", f"{text}: {WANTED_FILES} are better with many connections")
    return passed("ulimits", text)


def check_shared_memory(*, has_gpus: bool, folder: Path = SHARED_MEMORY) -> Finding:
    """Whether there is room for what NCCL and the workers of vLLM share; weights for the engines of
    this host do not lie there (sync/transports/shared_memory.py).
    """
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {free / 2**20:,.0f} MiB free"
    if has_gpus and free < NEEDED_SHARED_MEMORY:
        return failed(
            "shm",
            f"{text}: expected {NEEDED_SHARED_MEMORY / 2**20:,.0f} for NCCL and vLLM; enlarge it "
            "(docker run --shm-size 16g)",
        )
    return passed("shm", text)
