"""The C++ kernels compiled anew at other optimisation levels, and run as operators in a process of
their own: the bits of the installed build.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from megatron_rl.ops import kernels
from tests.ops.kernel_results import results
from tests.ops.rows import assert_same_bits
from tests.ops.sources import CSRC, HERE

# Those of setup.py that change code.
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden", "-w", "-fPIC"]
SOURCES = [CSRC / "token_logprobs.cpp", *sorted(CSRC.glob("cpu_*.cpp"))]
# What the process runs: it has no `megatron_rl._C`, whose operators have the same names.
PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
from tests.ops.kernel_results import results
torch.save(list(results()), sys.argv[2])
assert "megatron_rl._C" not in sys.modules
"""


def compiled(level: str, folder: Path) -> Path:
    """The operators as a library."""
    torch_folder = Path(torch.__file__).parent
    includes = [f"-I{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    library = folder / "kernels.so"
    objects = []
    for source in SOURCES:
        objects.append(folder / f"{source.stem}.o")
        command = ["g++", level, *FLAGS, *includes, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    link = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-o", library]
    subprocess.run(["g++", "-shared", *objects, *link], check=True)
    return library


@pytest.mark.parametrize(
    "level",
    ["-O0", pytest.param("-O3", marks=pytest.mark.slow)],  # the installed one is built at -O3
)
def test_the_optimisation_level_changes_no_bit(level, tmp_path):
    library, stored = compiled(level, tmp_path), tmp_path / "results.pt"
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, library, stored]
    subprocess.run(command, check=True, cwd=HERE.parents[1], env=environment)
    kernels.load()
    got = torch.load(stored)
    expected = list(results())
    num_sets = len(torch.ops.megatron_rl.instruction_sets())
    assert len(got) == len(expected) > 30 * num_sets
    for one, other in zip(got, expected):
        assert_same_bits(one, other)
