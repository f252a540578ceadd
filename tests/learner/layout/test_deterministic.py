"""What one setting of determinism turns on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from megatron_rl.learner.layout.deterministic import VARIABLES, use_deterministic_algorithms


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variables and torch are afterwards as they were."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_and_the_libraries_are_told(untouched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert not torch.are_deterministic_algorithms_enabled()
    use_deterministic_algorithms()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Tree"  # also a fixed order
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"  # Megatron insists on it
