"""The machine code of the CUDA kernels, which nvcc makes without a GPU: no approximation, nothing
contracted or flushed in the arithmetic, no spilled register, no atomic but the flag's minimum.
"""

import collections
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ops.sources import CSRC, HERE

NVCC = shutil.which("nvcc")
ROOT = HERE.parents[1]
COLUMNS = 64  # of a lane in a tile
# The same as in setup.py.
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "--prec-div=true", "--ftz=false"]


def _disassembler():
    """The folder of cuobjdump and nvdisasm: of a CUDA toolkit, or of Triton, which brings them."""
    places = [Path(path) for path in os.environ["PATH"].split(os.pathsep)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    names = ("cuobjdump", "nvdisasm")
    return next((place for place in places if all((place / name).exists() for name in names)), None)


TOOLS = _disassembler()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
needs_disassembler = pytest.mark.skipif(
    TOOLS is None, reason="neither a CUDA toolkit's cuobjdump and nvdisasm nor Triton's"
)


def _cuobjdump(option, cubin):
    environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    command = [TOOLS / "cuobjdump", option, cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    readable = subprocess.run(["c++filt"], input=text.stdout, capture_output=True, text=True)
    return readable.stdout.replace("megatron_rl::", "").replace("(anonymous namespace)::", "")


def _name(line):
    return re.search(r"(\w+_kernel(?:<[^>]*>)?)\(", line).group(1)


@pytest.fixture(scope="module", params=["80", "90a"], ids="sm_{}".format)
def cubin(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("cubin") / f"sm_{request.param}.cubin"
    gencode = f"-gencode=arch=compute_{request.param},code=sm_{request.param}"
    source = CSRC / "cuda" / "kernels.cu"
    subprocess.run(
        [NVCC, *FLAGS, gencode, "-Werror", "all-warnings", "-cubin", "-o", path, source], check=True
    )
    return path


@pytest.fixture(scope="module")
def machine_code(cubin):
    """Kernel -> its instructions with operands, without predicates."""
    found = {}
    for line in _cuobjdump("-sass", cubin).splitlines():
        if "Function :" in line:
            instructions = found[_name(line)] = []
        match = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][^;]*)", line)
        if match:
            instructions.append(match.group(1).strip())
    return found


@pytest.fixture(scope="module")
def opcodes(machine_code):
    """Kernel -> how often it holds each instruction."""
    return {
        name: collections.Counter(instruction.split()[0] for instruction in instructions)
        for name, instructions in machine_code.items()
    }


def _count(counts, prefix):
    return sum(number for name, number in counts.items() if (name + ".").startswith(prefix + "."))


def _tiles(opcodes, *, divided, entropy):
    endings = f", {str(divided).lower()}, {str(entropy).lower()}>"
    tiles = {name: counts for name, counts in opcodes.items() if name.startswith("tile_kernel")}
    chosen = {name: counts for name, counts in tiles.items() if name.endswith(endings)}
    assert len(chosen) == 3  # one for each dtype
    return chosen


@needs_nvcc
@needs_disassembler
def test_every_kernel_is_there_and_none_spills(cubin):
    lines = _cuobjdump("--dump-resource-usage", cubin).splitlines()
    usage = {
        _name(line): dict(re.findall(r"(\w+):(\d+)", following))
        for line, following in itertools.pairwise(lines)
        if "Function" in line and "_kernel" in line
    }
    kinds = collections.Counter(name.partition("<")[0] for name in usage)
    assert kinds == {"tile_kernel": 12, "words_kernel": 6, "gradient_kernel": 6, "finish_kernel": 1}
    for name, numbers in usage.items():
        assert numbers["STACK"] == numbers["LOCAL"] == "0", name
        assert int(numbers["REG"]) <= 96, name  # 20 warps and more on a multiprocessor


@needs_nvcc
@needs_disassembler
def test_nothing_is_approximated_flushed_or_contracted(machine_code, opcodes):
    for entropy in (False, True):
        for name, counts in _tiles(opcodes, divided=False, entropy=entropy).items():
            assert not [code for code in counts if "MUFU" in code or "FTZ" in code], name
            fused = [line for line in machine_code[name] if line.startswith("FFMA ")]
            with_constant = [
                sum(constant in line for line in fused)
                for constant in (" 1.442695", " -0.693147", " 0.04189", " 0.16667", " 0.49999")
            ]
            ones = sum(line.endswith(", 1") for line in fused)
            # A term is 7 fused multiply-adds and a subtraction. The compiler may compute a few of
            # them in two places, and the granule's reference, one and three sums, too.
            num_terms = with_constant[3]
            assert COLUMNS <= num_terms <= COLUMNS + 8, name
            assert with_constant[2:] == [num_terms] * 3 and ones == 2 * num_terms, name
            num_references = with_constant[0] - num_terms
            assert 1 <= num_references <= 4, name
            # The weighted term: one fused multiply-add and a product. Then sums and four merges.
            weighted = COLUMNS if entropy else 0
            assert with_constant[1] == num_terms + weighted, name
            others = 4 if entropy else 0
            assert len(fused) == 7 * num_terms + num_references + weighted + others, name
            sums = num_terms + 3 * num_references + COLUMNS + 4 + weighted + others
            assert _count(counts, "FADD") == sums, name
            assert _count(counts, "FMUL") == weighted + (12 if entropy else 4), name


@needs_nvcc
@needs_disassembler
def test_division_by_the_temperature_is_ieee_division(opcodes):
    """Its fast path starts from MUFU.RCP and corrects that; FTZ stands in its slow path alone,
    which asks there for NaN and infinity.
    """
    for entropy in (False, True):
        for name, counts in _tiles(opcodes, divided=True, entropy=entropy).items():
            assert _count(counts, "FCHK") == COLUMNS + 1, name  # each column, and the maximum
            assert {code for code in counts if "MUFU" in code} <= {"MUFU.RCP", "MUFU.RSQ"}, name
            flushing = {code.partition(".")[0] for code in counts if "FTZ" in code}
            assert flushing <= {"FSETP", "FADD"}, name
            assert sum(number for code, number in counts.items() if "FTZ" in code) <= 8, name


@needs_nvcc
@needs_disassembler
def test_logits_are_read_once_in_16_bytes(opcodes):
    for name, counts in opcodes.items():
        if name.startswith("tile_kernel"):
            num_loads = 16 if "float" in name else 8
            # Of a whole tile, and of one that the shard's edge cuts.
            assert sum(counts[code] for code in counts if re.match(r"LDG.*\.128", code)) == (
                2 * num_loads
            ), name
        atomics = [code for code in counts if code.startswith(("ATOM", "RED"))]
        if name == "finish_kernel":  # the flag of broken rows
            assert len(atomics) == 1 and ".MIN.S64." in atomics[0]
        else:
            assert not atomics, name


@needs_nvcc
@needs_disassembler
def test_the_gradients_columns_are_the_forwards_terms(opcodes):
    for scalar, columns in (("float", 16), ("BFloat16", 32), ("Half", 32)):
        counts = opcodes[f"gradient_kernel<{scalar}, false>"]
        # The rest is a row's 1 / S, and there alone MUFU stands.
        assert 7 * columns <= _count(counts, "FFMA") < 7 * columns + 24
        assert _count(counts, "MUFU") <= 4


@needs_nvcc
def test_the_binding_compiles_with_this_torch(tmp_path):
    """All but what a torch without CUDA lacks: a header that its build writes, and the linking."""
    include = Path(torch.__file__).parent / "include"
    options = ["-std=c++20", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", f"-I{include}"]
    options += [f"-I{include}/torch/csrc/api/include", "-Xcompiler", "-Wall,-Werror,-fsyntax-only"]
    source = CSRC / "cuda" / "token_logprobs_cuda.cpp"
    subprocess.run([NVCC, *options, "-c", "-o", tmp_path / "none.o", source], check=True)


def _setup(variable):
    environment = os.environ | {"MEGATRON_RL_CUDA": variable}
    command = [sys.executable, "-W", "ignore", "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_build_says_what_it_builds():
    result = _setup("0")
    assert result.returncode == 0
    assert "C++ kernels for avx512, avx2 and portable; no CUDA" in result.stdout
    result = _setup("yes")
    assert result.returncode != 0 and "expected 0, 1 or nothing, got yes" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_asking_for_cuda_without_it_is_an_error():
    result = _setup("1")
    assert result.returncode != 0
    assert "missing is a torch built with CUDA" in result.stderr
