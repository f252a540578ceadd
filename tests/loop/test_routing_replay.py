"""What a run needs to replay the routes of a mixture of experts, checked before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import Config, LearnerConfig, RolloutConfig
from megatron_rl.config.learner import MoeConfig
from megatron_rl.engine.launch import server_command
from megatron_rl.errors import ConfigError
from megatron_rl.loop.preflight import check_routing_replay
from megatron_rl.weights.geometry import Geometry, read_geometry

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


def config_of(routing_replay: Any, **settings: Any) -> Config:
    return Config(learner=LearnerConfig(moe=MoeConfig(routing_replay=routing_replay)), **settings)


@pytest.fixture
def experts() -> Geometry:
    return read_geometry(SHAPES / "Qwen3-30B-A3B")


def test_a_dense_model_has_no_routes(experts: Geometry) -> None:
    dense = replace(experts, model_type="qwen3", experts=None)
    check_routing_replay(config_of("none"), dense)
    for replay in ("recomputed", "rollout"):
        with pytest.raises(
            ConfigError, match=f"routing_replay={replay}: expected none for a model"
        ):
            check_routing_replay(config_of(replay), dense)


def test_engines_on_the_cpu_return_no_routes(
    experts: Geometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_routing_replay(config_of("recomputed"), experts)
    with pytest.raises(ConfigError, match=r"expected engines on a GPU, .* got engines on the CPU"):
        check_routing_replay(config_of("rollout"), experts)
    # Recorded routes need no engine; given engines are asked when they answer.
    check_routing_replay(config_of("rollout", replay="runs/other"), experts)
    given = RolloutConfig(num_engines=0, urls=["http://127.0.0.1:8000"])
    check_routing_replay(config_of("rollout", rollout=given), experts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_routing_replay(config_of("rollout"), experts)


def test_a_started_engine_is_asked_to_return_them() -> None:
    settings = {"model_path": "model", "port": 1, "seed": 0, "weight_backend": None}
    flag = "--enable-return-routed-experts"
    assert flag in server_command(RolloutConfig(), **settings, returns_routes=True)
    assert flag not in server_command(RolloutConfig(), **settings)
