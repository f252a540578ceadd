"""Checks that run before any process is started: they compare the settings with the model, the
data, the checkpoints and the hosts that the run will use.

Rules that involve nothing but settings are in `config/`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import Config, RewardTerm, RolloutConfig
from megatron_rl.config.evaluation import FIXED_STEP
from megatron_rl.data.end_tokens import end_tokens
from megatron_rl.data.evaluation_sets import EvaluationSet, held_out_set, open_sets
from megatron_rl.data.prompts import PromptStream
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.data.watch import Watch
from megatron_rl.engine.placement import place_engines
from megatron_rl.errors import ConfigError
from megatron_rl.learner.layout.parallel import check_world_size
from megatron_rl.learner.model.implementations import check_implementations
from megatron_rl.loop.inputs import Inputs, run_inputs
from megatron_rl.loop.verifiers import check_verifiers, set_verifiers_of
from megatron_rl.observe.loading import LoadingConsole
from megatron_rl.observe.trackers import check_trackers
from megatron_rl.process.node import Node, this_node
from megatron_rl.process.packages import ENGINE, check_packages
from megatron_rl.records import Truncation
from megatron_rl.reward.expected import answer_checks
from megatron_rl.reward.registry import resolve_verifiers
from megatron_rl.sync.transports.transport import has_many_sources, needs_gpus
from megatron_rl.weights.agreement import check_checkpoint
from megatron_rl.weights.geometry import Geometry, read_geometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The checked inputs of a run.

    Example: `Preflight(geometry=Geometry(...), tokenizer=..., end_token_ids=(2,),
    stream=PromptStream(...), verifiers={"chain_sum": (RewardTerm(verifier="exact"),)},
    sets=(EvaluationSet(...),),
    set_verifiers={"eval/aime24": (RewardTerm(verifier="math_verify"),)}, inputs={...})`.
    """

    geometry: Geometry
    tokenizer: Any  # of transformers
    end_token_ids: tuple[int, ...]  # at each of which a response ends
    stream: PromptStream
    verifiers: dict[str, tuple[RewardTerm, ...]]  # by source, of the training data
    sets: tuple[EvaluationSet, ...]  # that the run evaluates on
    set_verifiers: dict[str, tuple[RewardTerm, ...]]  # by source, of the named sets
    inputs: Inputs  # as they are saved with every checkpoint


def preflight(config: Config) -> Preflight:
    """Check everything that can be checked before a process is started.

    Raises:
        ConfigError, DataError: what is wrong, and where to change it.
    """
    geometry, tokenizer = prepare_model(config)
    is_first = int(os.environ.get("RANK", "0")) == 0
    sets: tuple[EvaluationSet, ...] = ()
    with LoadingConsole(is_shown=is_first) as watch:
        # The sets first, since the training data may take a minute to read.
        if is_evaluated(config):
            sets = prepare_sets(config, geometry, tokenizer, watch)
        stream = prepare_stream(config, geometry, tokenizer, watch)
    if is_evaluated(config) and config.data.num_held_out:
        sets = (held_out_set(stream.held_out(), config.eval), *sets)
    check_world_size(config.parallel)
    check_implementations(config.model, config.learner.optimizer)
    verifiers = resolve_verifiers(config.data.tasks)
    set_verifiers = set_verifiers_of(config)
    check_verifiers(config)
    check_trackers(config.tracking)
    check_replay(config)
    check_routing_replay(config, geometry)
    check_engine_place(config)
    if not config.replay and config.rollout.num_engines and config.rollout.placement != "nodes":
        check_packages(ENGINE, "rollout.num_engines")
    check_gpus(config)
    check_fixed_rollouts(config)
    return Preflight(
        geometry=geometry,
        tokenizer=tokenizer,
        end_token_ids=end_tokens(config.model.path, tokenizer, geometry.vocab_size),
        stream=stream,
        verifiers=verifiers,
        sets=sets,
        set_verifiers=set_verifiers,
        inputs=run_inputs(config, stream, sets),
    )


def is_evaluated(config: Config) -> bool:
    """Whether the run evaluates at all."""
    evaluation = config.eval
    return not config.replay and bool(evaluation.every or evaluation.at_start or evaluation.at_end)


def context_of(config: Config, geometry: Geometry) -> int:
    """The largest number of tokens of a prompt with its response in the engines."""
    return config.rollout.max_model_len or geometry.max_position_embeddings


def prepare_model(config: Config) -> tuple[Geometry, Any]:
    """Model shape and tokenizer, checked against the checkpoint, the layout and the settings of the
    engines.

    Raises:
        ConfigError, DataError: what is wrong, and where to change it.
    """
    geometry = read_geometry(config.model.path)
    geometry.check_layout(config.parallel)
    check_checkpoint(config.model.path, geometry)
    check_reference(config, geometry)
    check_stop_tokens(config, geometry)
    check_score_centering(config, geometry)
    tokenizer = load_tokenizer(config.model.path, geometry.vocab_size)
    check_context(config, geometry)
    return geometry, tokenizer


def check_context(config: Config, geometry: Geometry) -> None:
    """Raise ConfigError if the engines would serve more positions than the model has."""
    if context_of(config, geometry) > geometry.max_position_embeddings:
        raise ConfigError(
            "rollout.max_model_len: expected at most the model's "
            f"{geometry.max_position_embeddings} positions, got {config.rollout.max_model_len}; "
            "lower it, or extend the model in config.json: rope_parameters with rope_type yarn, a "
            "factor and original_max_position_embeddings"
        )


def prepare_data(config: Config, watch: Watch | None = None) -> tuple[Geometry, Any, PromptStream]:
    """Model shape, tokenizer and prompts, checked against each other.

    Args:
        watch: is told the progress of reading the data, and what was left out of it.

    Raises:
        ConfigError, DataError: what is wrong, and where to change it.
    """
    geometry, tokenizer = prepare_model(config)
    return geometry, tokenizer, prepare_stream(config, geometry, tokenizer, watch)


def prepare_stream(
    config: Config, geometry: Geometry, tokenizer: Any, watch: Watch | None = None
) -> PromptStream:
    """The stream of prompts, whose lengths have room in the model's context.

    Args:
        watch: is told the progress of reading the data, and what was left out of it.

    Raises:
        ConfigError, DataError: what is wrong, and where to change it.
    """
    context = context_of(config, geometry)
    # An engine that scores given tokens samples one more, which needs a position.
    is_scored = config.objective.acceptance.enabled
    room = min(context - is_scored, config.learner.tokens_per_micro_batch)
    limit = config.data.max_prompt_tokens or room - config.rollout.sampling.max_tokens
    if limit + config.rollout.sampling.max_tokens > context - is_scored:
        spare = " less one position, which scoring needs (objective.acceptance)" * is_scored
        raise ConfigError(
            f"data.max_prompt_tokens={limit}: expected room for rollout.sampling.max_tokens="
            f"{config.rollout.sampling.max_tokens} in the model's context of {context}{spare}"
        )
    has_room = config.eval.sampling.max_tokens < context
    if is_evaluated(config) and config.data.num_held_out and not has_room:
        raise ConfigError(
            f"eval.sampling.max_tokens: expected below the model's context of {context}, "
            f"got {config.eval.sampling.max_tokens}"
        )
    checks = answer_checks(resolve_verifiers(config.data.tasks))
    return PromptStream(config.data, tokenizer, limit, watch, checks)


def prepare_sets(
    config: Config, geometry: Geometry, tokenizer: Any, watch: Watch | None = None
) -> tuple[EvaluationSet, ...]:
    """The named sets that the run evaluates on.

    Raises:
        ConfigError, DataError: see `open_sets`.
    """
    checks = answer_checks(set_verifiers_of(config))
    return open_sets(config, tokenizer, context_of(config, geometry), watch, checks)


def check_stop_tokens(config: Config, geometry: Geometry) -> None:
    """Raise ConfigError if a stop token is beyond the model's vocabulary."""
    samplings = {
        "rollout.sampling": config.rollout.sampling,
        "eval.sampling": config.eval.sampling,
    }
    samplings |= {
        f"eval.{key}.sampling": each.sampling for key, each in config.eval.used_sets().items()
    }
    for key, sampling in samplings.items():
        beyond = [token for token in sampling.stop_token_ids if token >= geometry.vocab_size]
        if beyond:
            raise ConfigError(
                f"{key}.stop_token_ids: expected ids below the model's vocab_size "
                f"{geometry.vocab_size}, got {beyond[0]}"
            )


def check_reference(config: Config, geometry: Geometry) -> None:
    """Raise ConfigError or DataError unless `objective.kl.reference` is a complete checkpoint whose
    vocabulary matches the model's and which allows the run's layout.
    """
    path = config.objective.kl.reference
    if not path:
        return
    reference = read_geometry(path, "objective.kl.reference")
    reference.check_layout(config.parallel)
    if reference.vocab_size != geometry.vocab_size:
        raise ConfigError(
            f"objective.kl.reference={path}: expected the model's vocabulary of "
            f"{geometry.vocab_size}, got {reference.vocab_size}"
        )
    check_checkpoint(path, reference)


def check_score_centering(config: Config, geometry: Geometry) -> None:
    """Raise ConfigError if score centering asks the engine for as many log-probs as the vocabulary
    has tokens. The engine is asked for one more than the setting (engine/answers.py).
    """
    wanted = config.objective.score_centering.num_requested
    if wanted >= geometry.vocab_size:
        raise ConfigError(
            "objective.score_centering.num_logprobs: expected below the model's vocabulary of "
            f"{geometry.vocab_size}, got {wanted}"
        )


def check_routing_replay(config: Config, geometry: Geometry) -> None:
    """Raise ConfigError if there are no experts whose routes could be replayed, or if the engines
    cannot return theirs.
    """
    replay = config.learner.moe.routing_replay
    if replay != "none" and geometry.experts is None:
        raise ConfigError(
            f"learner.moe.routing_replay={replay}: expected none for a model without experts, "
            f"{config.model.path}; set learner.moe.routing_replay=none"
        )
    is_started = config.rollout.num_engines > 0 and not config.replay
    if replay == "rollout" and is_started and not torch.cuda.is_available():
        raise ConfigError(
            "learner.moe.routing_replay=rollout: expected engines on a GPU, as vLLM returns routed "
            "experts there only, got engines on the CPU; set learner.moe.routing_replay=recomputed"
        )


def check_replay(config: Config) -> None:
    """Raise ConfigError if `replay` is not a folder of recorded rollouts, or is this run's own."""
    if not config.replay:
        return
    folder = Path(config.replay)
    if not folder.is_dir():
        raise ConfigError(f"replay: expected a run's rollouts/ folder, got {folder}")
    if not any(folder.glob("step_*.safetensors")):
        raise ConfigError(
            f"replay={folder}: expected a run's rollouts/ folder, got one without a recorded step"
        )
    if folder.resolve().is_relative_to(Path(config.run_dir).resolve()):
        raise ConfigError(
            f"replay={folder}: expected the rollouts of another run, got those of run_dir="
            f"{config.run_dir}; choose another run_dir"
        )


def check_fixed_rollouts(config: Config) -> None:
    """Raise ConfigError if `eval.fixed_rollouts` cannot be scored with these settings."""
    folder, sampling = config.eval.fixed_rollouts, config.rollout.sampling
    if not folder:
        return
    first = Path(folder) / f"step_{FIXED_STEP:06d}.rank0.safetensors"
    if not first.is_file():
        raise ConfigError(
            f"eval.fixed_rollouts={folder}: expected a run's rollouts/ folder with its step "
            f"{FIXED_STEP}, {first.name} is not there"
        )
    # An engine scores given tokens over the whole vocabulary at temperature 1.
    if sampling.temperature != 1 or sampling.is_truncated:
        raise ConfigError(
            "eval.fixed_rollouts: expected rollout.sampling with temperature=1 and nothing "
            f"truncated, got temperature={sampling.temperature:g}, {sampling.truncation_text}"
        )


def check_engine_place(
    config: Config, *, world_size: int | None = None, local_world_size: int | None = None
) -> None:
    """Raise ConfigError if weights would not reach the engines that the run starts.

    Args:
        world_size: the number of ranks; None means those that torchrun started.
        local_world_size: the number of ranks on each host.
    """
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    rollout, transport = config.rollout, config.sync.transport
    num_nodes = 0
    if not config.replay and rollout.placement != "nodes":
        num_nodes = min(rollout.num_engines, world_size // local_world_size)
    if num_nodes > 1 and not has_many_sources(transport):
        raise ConfigError(
            f"rollout.num_engines={rollout.num_engines}: expected engines on the first host alone "
            f"with sync.transport={transport}, got engines on {num_nodes} hosts; choose "
            "sync.transport=collective"
        )


def check_gpus(config: Config, node: Node | None = None, num_gpus: int | None = None) -> None:
    """Raise ConfigError if a node has too few GPUs for the engines that the run starts on it, or
    none for a transport that needs them.

    Args:
        node: None means this node.
        num_gpus: that its ranks see; None means those that this process sees.
    """
    if config.replay:
        return
    num_gpus = torch.cuda.device_count() if num_gpus is None else num_gpus
    if needs_gpus(config.sync.transport) and not num_gpus:
        raise ConfigError(
            f"sync.transport={config.sync.transport}: expected a learner and engines on GPUs, got "
            "none on this host; choose another sync.transport"
        )
    place_engines(config.rollout, node or this_node(), num_gpus=num_gpus)


def truncation_of(rollout: RolloutConfig, device: str) -> Truncation:
    """The truncation that the engines' sampler applies, in the form that the learner needs.

    Args:
        device: "cpu" or "cuda", the learner's device type; the engines use the same.
    """
    sampling, ties = rollout.sampling, rollout.top_k_ties
    if ties == "auto":
        ties = "all" if device == "cpu" else "exact"
    return Truncation(top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p, ties=ties)
