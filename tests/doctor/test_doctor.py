"""The command on this host, and each finding on a host that lacks something."""

from __future__ import annotations

import resource
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.config import Config, ModelConfig, RolloutConfig, SyncConfig
from megatron_rl.doctor import __main__ as doctor
from megatron_rl.doctor import network, software, storage


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> Config:
    return Config(run_dir=str(tmp_path / "new"), model=ModelConfig(path=str(tiny_checkpoint)))


def write_yaml(folder: Path, model: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(
        f"model: {{path: {model}}}\nrun_dir: {folder / 'run'}\n"
        "data: {tasks: [{name: chain_sum, verifier: exact}]}\n"
    )
    return path


def test_one_line_for_each_thing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_yaml(tmp_path, tiny_checkpoint)
    assert doctor.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines]
    assert names == [
        *("host", "versions", "model", "GPUs", "NCCL", "ports"),
        *("names", "folder", "clock", "ulimits", "shm"),
    ]
    assert not any(line.startswith("FAIL") for line in lines)
    assert f"torch {torch.__version__}" in lines[1] and "megatron-core" in lines[1]
    assert doctor.main([str(path), "model.path=/nowhere"]) == 1
    assert "FAIL  model" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main([str(path), "--nodes", "-1"])
    assert "doctor: error: --nodes: expected 0 or more, got -1" in capsys.readouterr().err
    assert doctor.main([str(path), "loop.nun_steps=3"]) == 1
    assert "loop.num_steps" in capsys.readouterr().out


def test_it_listens_nowhere_and_binds_loopback_alone(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []

    class Socket(socket.socket):
        def bind(self, address: Any) -> None:
            bound.append(address[0])
            super().bind(address)

        def listen(self, *_: Any) -> None:
            raise AssertionError("the doctor listens")

    monkeypatch.setattr(socket, "socket", Socket)
    path = write_yaml(tmp_path, tiny_checkpoint)
    assert doctor.main([str(path), "rollout.port=23456", "rollout.num_engines=2"]) in (0, 1)
    assert bound == ["127.0.0.1"] * 2


def test_a_folder_that_other_nodes_do_not_see(config: Config, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    assert storage.check_folder(config, num_nodes=4, mounts=mounts).verdict == "ok"
    mounts.write_text("/dev/sda / ext4 rw 0 0\nserver:/x /elsewhere nfs4 rw 0 0\n")
    assert storage.check_folder(config, num_nodes=1, mounts=mounts).verdict == "ok"
    found = storage.check_folder(config, num_nodes=4, mounts=mounts)
    assert found.verdict == "FAIL" and "on ext4" in found.text and "all 4 nodes" in found.text


def test_a_folder_that_cannot_be_written(config: Config) -> None:
    found = storage.check_folder(replace(config, run_dir="/proc/runs"), num_nodes=1)
    assert found.verdict == "FAIL" and "expected one that can be written" in found.text


@pytest.mark.parametrize(("nodes", "expected"), [({}, 1), ({"SLURM_NNODES": "6"}, 6)])
def test_the_nodes_of_the_job(
    nodes: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in doctor.NODE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in nodes.items():
        monkeypatch.setenv(name, value)
    assert doctor.nodes_of_job() == expected


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(0.0, "ok"), (0.9, "ok"), (2.0, "warn"), (61.0, "FAIL")]
)
def test_a_clock_that_is_wrong(seconds: float, verdict: str) -> None:
    assert storage.judge_skew(seconds).verdict == verdict


@pytest.mark.parametrize(
    ("files", "locked", "has_rdma", "verdict"),
    [
        (-1, -1, True, "ok"),
        (65536, 8192, False, "ok"),
        (65536, 8192, True, "warn"),
        (4096, -1, True, "warn"),
        (256, -1, False, "FAIL"),
    ],
)
def test_limits(files: int, locked: int, has_rdma: bool, verdict: str) -> None:
    assert storage.judge_limits(files, locked, has_rdma=has_rdma).verdict == verdict
    assert resource.RLIM_INFINITY == -1  # as judge_limits takes it


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=0, used=0, free=64 * 2**20)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: usage)
    found = storage.check_shared_memory(has_gpus=True, folder=tmp_path)
    assert found.verdict == "FAIL" and "64 MiB free: expected 1,024" in found.text
    assert storage.check_shared_memory(has_gpus=False, folder=tmp_path).verdict == "ok"


def test_ports_in_use_and_engines_that_do_not_listen(config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = network.check_ports(replace(config, rollout=RolloutConfig(port=port)))
        assert found.verdict == "FAIL" and f"got {port} in use" in found.text
        given = RolloutConfig(num_engines=0, urls=[f"http://127.0.0.1:{port}"])
        assert network.check_ports(replace(config, rollout=given)).verdict == "ok"
    found = network.check_ports(replace(config, rollout=given))
    assert found.verdict == "FAIL" and f"127.0.0.1:{port}" in found.text
    assert network.check_ports(replace(config, rollout=RolloutConfig(port=port))).verdict == "ok"


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert network.check_names().verdict == "ok"
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    found = network.check_names()
    assert found.verdict == "FAIL" and "no-such-host.invalid" in found.text


def test_packages_of_a_transport(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(software.TRANSPORT_PACKAGES, "ipc", ("no-such-package",))
    assert software.check_versions(config).verdict == "ok"
    found = software.check_versions(replace(config, sync=SyncConfig(transport="ipc")))
    assert found.verdict == "FAIL" and "expected no-such-package" in found.text


def test_packages_and_interfaces(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "PACKAGES", ("torch", "no-such-package"))
    found = software.check_versions(config)
    assert found.verdict == "FAIL" and "expected no-such-package" in found.text
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert software.check_collectives().verdict == "ok"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker0")
    assert software.check_collectives().verdict == "ok"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    found = software.check_collectives()
    assert found.verdict == "FAIL" and "NCCL_SOCKET_IFNAME=ib7" in found.text


def test_gpus(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: False,
        device_count=lambda: 2,
        mem_get_info=lambda index: (80e9 - index * 20e9, 80e9),
        get_device_name=lambda index: "NVIDIA H100",
    )
    monkeypatch.setattr(software.torch, "cuda", cuda)
    assert software.check_gpus(config, devices=tmp_path).verdict == "warn"
    (tmp_path / "nvidia0").touch()
    found = software.check_gpus(config, devices=tmp_path)
    assert found.verdict == "FAIL" and "expected torch to use the GPUs" in found.text
    cuda.is_available = lambda: True
    found = software.check_gpus(config, devices=tmp_path)
    assert found.verdict == "warn" and "GPU 1: 20 of 80 GB in use" in found.text
