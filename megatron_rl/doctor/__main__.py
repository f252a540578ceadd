"""`python -m megatron_rl.doctor CONFIG [key=value ...]`: prints one line for each thing of this
host that a run depends on. The exit code is 1 if something will not work.

Run it on every node, under the launcher of the run: `srun python -m megatron_rl.doctor CONFIG`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence

import torch

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.doctor.findings import Finding, failed, passed
from megatron_rl.doctor.network import check_names, check_ports
from megatron_rl.doctor.software import check_collectives, check_gpus, check_versions
from megatron_rl.doctor.storage import (
    check_clock,
    check_folder,
    check_limits,
    check_shared_memory,
)
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.weights.geometry import read_geometry

# Variables in which SLURM says how many nodes a job has.
NODE_VARIABLES = ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, check and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="doctor", description="What this host lacks for a run.")
    parser.add_argument("config", help="YAML file of the run, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=0, help="of the run; 0: SLURM's, or 1")
    options = parser.parse_intermixed_args(arguments)
    if options.nodes < 0:
        parser.error(f"--nodes: expected 0 or more, got {options.nodes}")
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(failed("settings", str(error)))
        return 1
    findings = examine(config, num_nodes=options.nodes or nodes_of_job())
    for finding in findings:
        print(finding)
    return int(any(finding.verdict == "FAIL" for finding in findings))


def nodes_of_job() -> int:
    """The number of nodes of the SLURM job that this process belongs to; 1 outside of one."""
    return int(next((os.environ[n] for n in NODE_VARIABLES if os.environ.get(n)), "1"))


def examine(config: Config, *, num_nodes: int) -> list[Finding]:
    """All findings on this host."""
    return [
        passed("host", f"{socket.gethostname()}, {len(os.sched_getaffinity(0))} cores"),
        check_versions(config),
        check_model(config),
        check_gpus(config),
        check_collectives(),
        check_ports(config),
        check_names(),
        check_folder(config, num_nodes=num_nodes),
        check_clock(config),
        check_limits(),
        check_shared_memory(has_gpus=torch.cuda.is_available()),
    ]


def check_model(config: Config) -> Finding:
    """Whether this host can read the model's shape."""
    try:
        geometry = read_geometry(config.model.path)
    except (ConfigError, DataError, OSError) as error:
        return failed("model", str(error))
    return passed("model", f"{config.model.path}, {geometry.model_type}")


if __name__ == "__main__":
    sys.exit(main())
