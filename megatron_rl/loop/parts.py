"""The parts of a run on one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.config import Config, RewardTerm
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.checkpoint_writer import CheckpointWriter
from megatron_rl.loop.crew import Crew
from megatron_rl.loop.evaluate import Evaluator
from megatron_rl.loop.inputs import Inputs
from megatron_rl.loop.link import EngineLink
from megatron_rl.loop.machine import Meter
from megatron_rl.loop.state import LoopState
from megatron_rl.observe.recorder import Recorder
from megatron_rl.observe.stopwatch import Stopwatch
from megatron_rl.reward.score import Scorer
from megatron_rl.rollout.source import RolloutSource
from megatron_rl.rollout.writer import RolloutWriter
from megatron_rl.sync.contribute import Contributor


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of a run on one rank; parts that this rank does not need are None.

    Example: rank 1 of 2 with TP=2 holds `Run(config=Config(...), learner=Learner(...),
    state=LoopState(...), recorder=Recorder(...), writer=RolloutWriter(...),
    stopwatch=Stopwatch(...), verifiers={"chain_sum": (RewardTerm(verifier="exact"),)},
    crew=Crew(...), inputs={...}, was_resumed=False, source=None, evaluator=None, link=None,
    contributor=None, meter=Meter(...), scorer=None, checkpoints=CheckpointWriter(...))`.
    """

    config: Config
    learner: Learner
    state: LoopState
    recorder: Recorder  # writes only on rank 0
    writer: RolloutWriter  # writes on the ranks that hold rollouts or their log-probs
    stopwatch: Stopwatch
    # by the name of the task or file that prompts come from
    verifiers: Mapping[str, tuple[RewardTerm, ...]]
    crew: Crew | None  # on every rank, unless rollouts are replayed
    inputs: Inputs  # are saved with every checkpoint
    was_resumed: bool  # from a checkpoint
    source: RolloutSource | None  # on the heads of the replicas
    evaluator: Evaluator | None  # on the heads of the replicas, unless rollouts are replayed
    link: EngineLink | None  # on rank 0, unless rollouts are replayed
    contributor: Contributor | None  # on the other sources of the weights
    meter: Meter  # of the machines' use
    scorer: Scorer | None  # on the heads of the replicas, unless rollouts are replayed
    checkpoints: CheckpointWriter

    @property
    def sender(self) -> EngineLink | Contributor | None:
        """What this rank publishes weights with; None if it sends none."""
        return self.link or self.contributor

    def failure(self) -> str:
        """What a verifier failed on last, on this rank; "" if nothing is known."""
        return self.scorer.last_failure if self.scorer else ""
