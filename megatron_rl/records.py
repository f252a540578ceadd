"""The records that one phase of a step hands to the next.

Legend of shapes, used in every docstring of the package:
`P` prompts, `G` samples per prompt (the group), `L` tokens of one sequence, `T` tokens of one
packed row, `S` packed sequences in a row, `M` micro-batches, `V` vocabulary size (of the local
shard where a docstring says so), `H` hidden size, `K` tokens of a head.

Three policies: `rollout_logprobs` (the engine's, when it sampled), `recomputed_logprobs` (the
learner's at the weights before the update), `policy_logprobs` (the learner's, under gradient).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # reward workers and the launcher read these records without paying for torch
    import torch

# How the engines' HTTP routes write a log-prob that is NaN or -inf.
MISSING_LOGPROB = -9999.0
# A log-prob of at most this much above 0 is a rounding error of a logit minus its log-sum-exp.
MAX_LOGPROB_ROUNDING = 1e-3
# Rewards of one group that differ by at most this much, relative to the largest of them, are equal:
# it is a few units in the last place of float32, in which a verifier may compute.
REWARD_ROUNDING = 1e-6
SAMPLE_BITS = 8  # low bits of a seed, left free: vLLM seeds sample i of a prompt with seed + i
MAX_SAMPLES = 2**SAMPLE_BITS
TOKEN_VARIABLE = "MEGATRON_RL_TOKEN"  # environment variable that carries the run's bearer token
# The name under which sync/engine_side/plugin.py registers with vLLM's weight transfer.
WEIGHT_BACKEND = "megatron_rl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, tokenized.

    Example: `Prompt(index=17, source="chain_sum", text="4+3=", token_ids=(1, 23, 14, 22, 32),
    answer="7", metadata={"difficulty": 1})`. `index` is the global position in the run's stream of
    prompts: sampling seeds derive from it and never from a rank.
    """

    index: int
    source: str  # which task or file it came from, for metrics by source
    text: str  # the tokenizer's input, chat template included
    token_ids: tuple[int, ...]
    answer: str  # the reference that the verifier compares the response with
    # the task's own record, for its verifier; plain JSON values
    metadata: dict[str, Any] = field(default_factory=dict)


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two records of one class hold equal arrays and equal other values."""
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in one.__dataclass_fields__
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutHead:
    """The `K` likeliest tokens of the distribution from which each response token was sampled, the
    likeliest first, for score centering.

    Example of one response token, K=3, sampled with top_k=2: `RolloutHead(token_ids=[[26, 7, -1]],
    logprobs=[[-0.21, -1.66, -inf]])`.
    """

    token_ids: np.ndarray  # [response tokens, K] int32, -1 where the engine had no further token
    logprobs: np.ndarray  # [response tokens, K] float32, -inf there

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RolloutHead) and _are_equal(self, other)

    def __hash__(self) -> int:
        return hash(self.token_ids.tobytes())


ROLLOUT_DTYPES = {
    "token_ids": np.int32,
    "loss_mask": np.bool_,
    "rollout_logprobs": np.float64,
    "weight_versions": np.int32,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One sampled sequence. The tokens where `loss_mask` is True are the response, wherever they
    are in the sequence. The first four fields take any sequence, and hold an array.

    Example: prompt "4+3=" and the answer "7<eos>": `Rollout(token_ids=(1, 23, 14, 22, 32, 26, 2),
    loss_mask=(False,) * 5 + (True, True), rollout_logprobs=(0.0,) * 5 + (-0.21, -0.03),
    weight_versions=(-1,) * 5 + (3, 3), finish_reason="stop", text="7",
    engine="http://127.0.0.1:18400")`.
    """

    token_ids: np.ndarray  # [L] int32, prompt included
    loss_mask: np.ndarray  # [L] bool, True where the policy chose the token
    # [L] float64, log-prob of token_ids[t] when sampled, 0.0 where the mask is False
    rollout_logprobs: np.ndarray
    # [L] int32, version of the weights that sampled the token, -1 where the mask is False
    weight_versions: np.ndarray
    finish_reason: str  # "stop", "length" (max_tokens); "timeout", "crash" of its environment
    text: str  # the response, decoded without special tokens
    engine: str = ""  # url of the engine that sampled it (the last one of an episode); "": unknown
    # of the response tokens, in order; None: there are no such tokens, or no head was requested
    head: RolloutHead | None = None
    # [up to L, layers, k] the experts that the engine sent the first tokens to; None: not returned
    routes: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in ROLLOUT_DTYPES.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rollout) and _are_equal(self, other)

    def __hash__(self) -> int:
        return hash(self.token_ids.tobytes())

    @property
    def num_response_tokens(self) -> int:
        """Tokens that the policy chose."""
        return int(np.count_nonzero(self.loss_mask))

    @property
    def is_truncated(self) -> bool:
        """Whether the response was cut at max_tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Which tokens the engine's sampler may choose. vLLM applies the rules in this order: min_p
    times the largest probability as a lower bound, then top_k, then top_p of the remaining mass.

    Example: `Truncation(top_k=20, top_p=0.9, ties="all")`.
    """

    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    ties: str = "all"  # equal logits at rank k: "all" are kept, or only until there are "exact"ly k

    def __post_init__(self) -> None:
        is_sound = self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p < 1
        if not is_sound or self.ties not in ("all", "exact"):
            raise ValueError(
                "expected top_k of 0 or more, top_p in (0, 1], min_p in [0, 1) and ties all or "
                f"exact, got {self}"
            )

    @property
    def is_active(self) -> bool:
        """Whether a token can be excluded at all."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """A prompt and the `G` rollouts sampled for it. One rank scores the whole group.

    Example: `RolloutGroup(prompt=Prompt(index=17, ...), rollouts=(Rollout(...), Rollout(...)))`.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # [G]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A verifier's judgement of one response.

    Example: `Score(reward=1.0, is_formatted=True, failure=None)`; a verifier that ran out of time
    gives `Score(reward=0.0, is_formatted=False, failure="timeout")`, which is counted separately
    and not as a wrong answer.
    """

    reward: float
    is_formatted: bool  # an answer could be read from the response, right or wrong
    failure: str | None  # "timeout", "crash", or None if the verifier judged the response
    group_reward: float = 0.0  # added by the group verifier, in training only
    # of a task with several verifiers: each one's name and reward, without its weight
    verifier_rewards: tuple[tuple[str, float], ...] = ()

    @property
    def is_correct(self) -> bool:
        """Whether evaluation counts the response as correct: the verifier, or the first one of
        several, gave it the full reward.
        """
        reward = self.verifier_rewards[0][1] if self.verifier_rewards else self.reward
        return self.failure is None and reward >= 1.0 - REWARD_ROUNDING


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence for the learner: a rollout with its reward and advantage.

    Example: `Sample(prompt_index=17, sample_index=2, rollout=Rollout(...), reward=1.0,
    advantage=0.98)`.
    """

    prompt_index: int
    sample_index: int  # 0 to G-1
    rollout: Rollout
    reward: float
    advantage: float
    # False: the sample's discrepancy is measured, but the learner does not train on it
    is_kept: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group and the verifier's score of each of its rollouts.

    Example: `ScoredGroup(group=RolloutGroup(...), scores=(Score(reward=1.0, ...),
    Score(reward=0.0, ...)))`.

    Raises:
        ValueError: the number of scores differs from the number of rollouts.
    """

    group: RolloutGroup
    scores: tuple[Score, ...]  # [G]

    def __post_init__(self) -> None:
        _check_group_size(self.group, scores=self.scores)

    def without_judgement(self) -> JudgedGroup:
        """The group in the form in which it is recorded when the learner does not train on it: no
        penalties, advantages of 0, no signal, every rollout kept.
        """
        zeros = (0.0,) * len(self.scores)
        return JudgedGroup(
            group=self.group,
            scores=self.scores,
            overlong_penalties=zeros,
            advantages=zeros,
            is_kept=(True,) * len(self.scores),
            has_signal=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedGroup:
    """A scored group with penalties, advantages, and which of its rollouts the learner trains on.

    Example: two responses, of which the second was cut and is not trained on: `JudgedGroup(
    group=RolloutGroup(...), scores=(Score(...), Score(...)), overlong_penalties=(0.0, -0.5),
    advantages=(1.0, -1.0), is_kept=(True, False), has_signal=True)`.

    Raises:
        ValueError: a field does not hold exactly one value for each rollout.
    """

    group: RolloutGroup
    scores: tuple[Score, ...]  # [G] as the verifiers gave them
    # [G] at most 0, added to the reward of a long response; 0 if it could not be scored
    overlong_penalties: tuple[float, ...]
    # [G] of the rewards with the penalties added; 0 if the response could not be scored
    advantages: tuple[float, ...]
    is_kept: tuple[bool, ...]  # [G] as in Sample
    # whether the verifier's own scores, before any penalty, tell a kept response from its group
    has_signal: bool

    def __post_init__(self) -> None:
        _check_group_size(
            self.group,
            scores=self.scores,
            overlong_penalties=self.overlong_penalties,
            advantages=self.advantages,
            is_kept=self.is_kept,
        )

    def samples(self) -> tuple[Sample, ...]:
        """[G] one sample for each rollout, in order."""
        columns = zip(self.group.rollouts, self.scores, self.advantages, self.is_kept, strict=True)
        return tuple(
            Sample(
                prompt_index=self.group.prompt.index,
                sample_index=index,
                rollout=rollout,
                reward=score.reward,
                advantage=advantage,
                is_kept=is_kept,
            )
            for index, (rollout, score, advantage, is_kept) in enumerate(columns)
        )


def _check_group_size(group: RolloutGroup, **columns: Sequence[Any]) -> None:
    """Raise ValueError unless every column holds one value for each rollout of the group."""
    for name, column in columns.items():
        if len(column) != len(group.rollouts):
            raise ValueError(
                f"{name}: expected one for each of the {len(group.rollouts)} rollouts of prompt "
                f"{group.prompt.index}, got {len(column)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """The rollouts of one step. The head of each replica holds that replica's share; on all other
    ranks `groups` is empty.

    Example: one prompt, sampled in one round: `SampledStep(groups=(JudgedGroup(...),),
    num_prompts=1, num_rounds=1)`.
    """

    groups: tuple[JudgedGroup, ...]  # by prompt index
    num_prompts: int  # sampled by all replicas together, whether kept or not
    num_rounds: int  # of sampling; 0 if the rollouts were read from a recording
    metrics: Mapping[str, Any] = field(default_factory=dict)  # `Metric`s of the source

    def samples(self) -> list[Sample]:
        """All rollouts of this replica, group after group."""
        return [sample for group in self.groups for sample in group.samples()]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A packed row within the token budget, and the samples that it contains. Every `[T]` tensor
    is aligned with the *prediction*: position t of the row predicts `labels[t]`, the next token of
    the sequence, so no later code shifts anything.

    Example: the sequence (1, 32, 26, 2) with response (26, 2), padded to 4 of T=8:
    `tokens=[1,32,26,2,0,0,0,0]`, `labels=[32,26,2,0,0,0,0,0]`, `loss_mask=[F,T,T,F,F,F,F,F]`,
    `positions=[0,1,2,3,0,1,2,3]`, `cu_seqlens=[0,4]`, `cu_seqlens_padded=[0,4]`,
    `samples=(Sample(...),)`; the rest of the row is padding that belongs to no sequence. A filler
    row is fully masked and holds one sequence of one token that belongs to no sample.
    """

    tokens: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, 0 where nothing is predicted
    positions: torch.Tensor  # [T] int64, restart at 0 in every sequence
    loss_mask: torch.Tensor  # [T] bool, True where labels[t] was sampled by the policy
    rollout_logprobs: torch.Tensor  # [T] float32
    advantages: torch.Tensor  # [T] float32, the sequence's advantage on each of its tokens
    weight_versions: torch.Tensor  # [T] int64, -1 where the mask is False
    sequence_ids: torch.Tensor  # [T] int64, 0 to S-1, -1 on padding
    cu_seqlens: torch.Tensor  # [S+1] int32, real lengths, cumulated
    cu_seqlens_padded: torch.Tensor  # [S+1] int32, where each sequence starts in the row
    samples: tuple[Sample, ...]  # [S] in the order of the row; () in a filler row
    # The heads of the rollouts, absent where the mask is False; None: no heads were requested.
    head_ids: torch.Tensor | None = None  # [T, K] int32, -1 where there is no token
    rollout_head_logprobs: torch.Tensor | None = None  # [T, K] float32, -inf where there is none
    # [T, layers, k] int16, the rollouts' routes, -1 where there is none; None: no rollout has any
    routes: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """This rank's share of a global batch; each mini-batch is one optimizer step. In each
    mini-batch, all data-parallel ranks hold the same number of micro-batches; fully masked ones are
    added where a rank has fewer.

    Example: one optimizer step on two rows, and no dropped samples: `TrainBatch(
    mini_batches=((MicroBatch(...), MicroBatch(...)),), num_left_out=(0,), dropped=())`.
    """

    mini_batches: tuple[tuple[MicroBatch, ...], ...]
    # for each mini-batch, the samples of this replica's groups that are not kept although another
    # sample of their group is; `normalize=constant` counts them
    num_left_out: tuple[int, ...]
    # rows of samples whose discrepancy is measured but on which the learner does not train; the
    # same number on every rank, usually 0
    dropped: tuple[MicroBatch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputedRow:
    """A row with the learner's log-probs, computed at the weights before the update.

    Example: the row of `MicroBatch`'s example: `RecomputedRow(micro_batch=MicroBatch(...),
    recomputed_logprobs=[0, -0.3, -0.1, 0, 0, 0, 0, 0], is_outside_support=[False] * 8)`.
    """

    micro_batch: MicroBatch
    recomputed_logprobs: torch.Tensor  # [T] float32, 0 where the row's loss mask is False
    # [T] bool: with these log-probs the sampler could not have chosen the label
    is_outside_support: torch.Tensor
    # [T, K] float32 of the tokens of `head_ids`, 0 where there is none; None without heads
    recomputed_head_logprobs: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """The outcome of one training step, the same on every rank.

    Example: `StepReport(step=12, dual_value=0.1, metrics={"learner/grad_norm": 0.7}, problem="")`.
    """

    step: int
    dual_value: float  # lambda after this step's dual update
    metrics: dict[str, float]
    problem: str  # why updates of the step were left out, in a line; "" if none was
