"""The names that tests of several folders import; see support/ranks.py."""

from __future__ import annotations

from tests.support.ranks import ROOT, rank_environment, run_module, torchrun_command

__all__ = ["ROOT", "run_module", "torchrun_command", "torchrun_environment"]

torchrun_environment = rank_environment
