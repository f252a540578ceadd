"""The flag of broken rows, in the CPU's memory instead of a GPU's: what is told, and only once. The
kernels that write it: test_device_code.py, test_cuda.py.
"""

import pytest
import torch

from megatron_rl.errors import DataError, DivergenceError
from megatron_rl.ops import broken_rows, kernels
from megatron_rl.ops.broken_rows import NO_ROW, check_broken_rows

CPU = torch.device("cpu")


@pytest.fixture
def flag(monkeypatch):
    made = torch.tensor([NO_ROW])
    monkeypatch.setitem(broken_rows._FLAGS, CPU, made)
    return made


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (2 * 17 + 1, DivergenceError, "micro-batch 3: logits of row 17: expected numbers"),
        (2 * 17, DataError, "micro-batch 3: label of row 17: expected a token id"),
        (0, DataError, "label of row 0"),
    ],
)
def test_a_broken_row_is_told_once(flag, number, error, words):
    check_broken_rows(CPU, "micro-batch 2")
    flag.fill_(number)
    with pytest.raises(error, match=words):
        check_broken_rows(CPU, "micro-batch 3")
    assert int(flag) == NO_ROW
    check_broken_rows(CPU, "micro-batch 4")


def test_a_device_without_a_flag_has_no_broken_rows():
    check_broken_rows(torch.device("cuda", 7), "nothing")


def test_torch_operations_in_place_of_the_cuda_kernels_write_the_flag_too(flag):
    logits, labels = torch.zeros(5, 300), torch.tensor([0, 1, 300, 3, 4])
    logits[1, 7] = torch.inf
    is_counted = torch.tensor([True, False, True, True, True])
    words = kernels._reference_nodes(logits, labels, 1.0, [0, 300], 0, 300, False)[None]
    finished = kernels._reference_finish(words, labels, [0, 300], 300, False, "", is_counted, flag)
    assert finished[0].isnan().tolist() == [False, True, True, False, False]
    with pytest.raises(DataError, match="row 2"):
        check_broken_rows(CPU, "here")
    kernels._reference_finish(words, labels, [0, 300], 300, False, "", None, flag)
    with pytest.raises(DivergenceError, match="row 1"):
        check_broken_rows(CPU, "here")


def test_the_cpu_takes_no_flag(flag):
    words = torch.zeros(1, 1, 4, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="flag: expected none"):
        kernels.finish(words, torch.tensor([0]), None, [0, 128], 128, False, flag)
