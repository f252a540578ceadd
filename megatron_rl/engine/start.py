"""Starts the rollout engines of a config: for a training run, for `serve`, and for several runs
that share engines.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import replace
from pathlib import Path

import torch

from megatron_rl.config import Config, RolloutConfig
from megatron_rl.engine.checkpoint import engine_model
from megatron_rl.engine.placement import place_engines
from megatron_rl.engine.server import Engine, start_engines
from megatron_rl.process.interface import address_of, local_address
from megatron_rl.process.loopback import HOST
from megatron_rl.process.node import Node
from megatron_rl.records import TOKEN_VARIABLE
from megatron_rl.weights.geometry import read_hf_config
from megatron_rl.weights.rope import num_positions

ALONE = Node(index=0, count=1, num_ranks=0)
ENGINE_MODEL = "engine_model"  # folder of the checkpoint that quantised engines start from


def start_engines_of(
    config: Config,
    folder: Path,
    *,
    log_dir: Path | None = None,
    token: str = "",
    is_sent_weights: bool = True,
    node: Node = ALONE,
    host: str = HOST,
) -> list[Engine]:
    """Start the engines of `config.rollout` on this node, without waiting for them.

    Args:
        folder: the run folder; a checkpoint for the engines is written there if they need one.
        log_dir: folder of the engines' logs; None means `folder`/logs.
        token: the bearer token; "" means the one in MEGATRON_RL_TOKEN, or a random one.
        is_sent_weights: whether a weight sync sends them weights before they are used.
        node: this node; by default the only one, without ranks.
        host: the address of this node that they listen on.

    Raises:
        DataError: the checkpoint cannot be read.
        ConfigError: the node has too few GPUs.
        EngineError: a port is already in use.
    """
    rollout = config.rollout
    places = place_engines(rollout, node, num_gpus=torch.cuda.device_count())
    if not places:
        return []
    model_path = engine_model(
        rollout, config.model.path, folder / ENGINE_MODEL, is_sent_weights=is_sent_weights
    )
    return start_engines(
        _with_positions(rollout, config.model.path),
        model_path=model_path,
        log_dir=log_dir or folder / "logs",
        token=token or os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32),
        seed=config.loop.seed,
        update_timeout_seconds=config.sync.timeout_seconds,
        num_logprobs=config.objective.score_centering.num_requested,
        host=host,
        places=places,
        returns_routes=config.learner.moe.routing_replay == "rollout",
    )


def listening_address(rollout: RolloutConfig, node: Node) -> str:
    """The address on which engines of this node listen.

    Raises:
        ConfigError: `rollout.host` is not of this node, or the first node cannot be reached.
    """
    if rollout.host:
        return address_of(rollout.host)
    if node.count == 1:
        return HOST
    return local_address([os.environ["MASTER_ADDR"]])


def _with_positions(rollout: RolloutConfig, model_path: str) -> RolloutConfig:
    """The settings of engines that serve as many positions as the learner computes. Under YaRN vLLM
    takes max_position_embeddings for the extended length (vllm/config/model.py,
    `_get_and_verify_max_len`), which a config may still have at the original one.
    """
    raw = read_hf_config(model_path)
    positions = num_positions(raw)
    if positions == raw["max_position_embeddings"]:
        return rollout
    overrides = json.dumps({"max_position_embeddings": positions})
    return replace(rollout, extra_args=["--hf-overrides", overrides, *rollout.extra_args])
