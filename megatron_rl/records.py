"""What travels between the stations of a step.

Legend of shapes, used in every docstring of the package:
`P` prompts, `G` samples a prompt (the group), `L` tokens of one sequence, `T` tokens of one packed
row, `S` packed sequences in a row, `M` micro-batches, `V` vocabulary (the local shard where said),
`H` hidden size.

Three policies, three names, never shortened:
`rollout_logprobs` (the engine's, when it sampled), `recomputed_logprobs` (the learner's at the
weights before the update), `policy_logprobs` (the learner's, under gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reward workers and the launcher read these records without paying for torch
    import torch

# How the engines' HTTP routes write a log-prob that is NaN or -inf.
MISSING_LOGPROB = -9999.0
# A log-prob this little above 0 is rounding: a logit less a float32 log-sum-exp beside it.
MAX_LOGPROB_ROUNDING = 1e-3
SAMPLE_BITS = 8  # low bits of a seed: vLLM seeds sample i of a prompt with seed + i
MAX_SAMPLES = 2**SAMPLE_BITS
TOKEN_VARIABLE = "MEGATRON_RL_TOKEN"  # environment variable that carries the run's bearer token
# What the engines know the weight transfer of sync/engine_side/plugin.py by.
WEIGHT_BACKEND = "megatron_rl_shm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question, tokenized.

    Example: `Prompt(index=17, source="chain_sum", text="4+3=", token_ids=(1, 23, 14, 22, 32),
    answer="7", metadata={"difficulty": 1})`. `index` is the global position in the run's stream of
    prompts: sampling seeds derive from it and never from a rank.
    """

    index: int
    source: str  # which task or file it came from, for metrics by source
    text: str  # what the tokenizer was given, chat template included
    token_ids: tuple[int, ...]
    answer: str  # what the verifier compares with
    metadata: dict[str, Any] = field(
        default_factory=dict
    )  # the task's own record, for its verifier; plain JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled sequence; what `loss_mask` keeps is the response, wherever it stands.

    Example: prompt "4+3=" and the answer "7<eos>": `Rollout(token_ids=(1, 23, 14, 22, 32, 26, 2),
    loss_mask=(False,) * 5 + (True, True), rollout_logprobs=(0.0,) * 5 + (-0.21, -0.03),
    weight_versions=(-1,) * 5 + (3, 3), finish_reason="stop", text="7")`.
    """

    token_ids: tuple[int, ...]  # [L], prompt included
    loss_mask: tuple[bool, ...]  # [L], True where the policy chose the token
    rollout_logprobs: tuple[
        float, ...
    ]  # [L] log-prob of token_ids[t] when sampled, 0.0 where the mask is False
    weight_versions: tuple[
        int, ...
    ]  # [L] version of the weights that sampled the token, -1 where the mask is False
    finish_reason: str  # "stop": the model ended; "length": cut at max_tokens
    text: str  # the response, decoded without special tokens

    @property
    def num_response_tokens(self) -> int:
        return sum(self.loss_mask)

    @property
    def is_truncated(self) -> bool:
        """Cut at max_tokens."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Which tokens the engine's sampler may choose, in the order in which vLLM decides: min_p of
    the largest probability, then top_k, then top_p of what is left.

    Example: `Truncation(top_k=20, top_p=0.9, ties="all")`.
    """

    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    ties: str = "all"  # of equal logits at rank k: "all" stay, or as many as make "exact"ly k

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
class EngineAddress:
    """Where a rollout engine listens, and the run's bearer token; the token is never printed.

    Example: `EngineAddress(url="http://127.0.0.1:18400", token="...")`.
    """

    url: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """A prompt and the `G` rollouts sampled for it; scored whole, on one rank.

    Example: `RolloutGroup(prompt=Prompt(index=17, ...), rollouts=(Rollout(...), Rollout(...)))`.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]  # [G]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one response was judged.

    Example: `Score(reward=1.0, is_formatted=True, failure=None)`; a verifier that ran out of time
    gives `Score(reward=0.0, is_formatted=False, failure="timeout")`, which is counted separately
    and not as a wrong answer.
    """

    reward: float
    is_formatted: bool  # an answer could be read from the response, right or wrong
    failure: str | None  # "timeout", "crash", or None if the verifier judged the response
    group_reward: float = 0.0  # what the group verifier adds to the reward in training

    @property
    def is_correct(self) -> bool:
        """Whether evaluation counts the response as correct: a verifier gave it the full reward."""
        return self.failure is None and self.reward >= 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence on its way to the learner: a rollout, and what was made of its group's rewards.

    Example: `Sample(prompt_index=17, sample_index=2, rollout=Rollout(...), reward=1.0,
    advantage=0.98)`.
    """

    prompt_index: int
    sample_index: int  # 0 to G-1
    rollout: Rollout
    reward: float
    advantage: float
    # False: the discrepancy is measured on it, and nothing is learnt from it
    is_kept: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledStep:
    """A step's rollouts of one replica, on its head, and what was made of them; elsewhere the lists
    are empty.

    Example: one group of two of which one response was cut and is not learnt from: `SampledStep(
    groups=[RolloutGroup(...)], scores=[(Score(...), Score(...))], penalties=[[0.0, -0.5]],
    advantages=[[1.0, -1.0]], is_kept=[[True, False]], num_prompts=1, num_rounds=1)`.
    """

    groups: Sequence[RolloutGroup]  # [P], by prompt index
    scores: Sequence[Sequence[Score]]  # [P][G]
    penalties: Sequence[Sequence[float]]  # [P][G] at most 0: what length took off the reward
    advantages: Sequence[Sequence[float]]  # [P][G]
    is_kept: Sequence[Sequence[bool]]  # [P][G] as in Sample
    num_prompts: int  # of all replicas together, whether kept or not
    num_rounds: int  # in which they were sampled; 0 where they were recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A packed row of a fixed token budget. Every `[T]` tensor is aligned with the *prediction*:
    position t of the row predicts `labels[t]`, which is the sequence's next token; nothing is
    shifted later.

    Example: the sequence (1, 32, 26, 2) with response (26, 2), padded to 4 of T=8:
    `tokens=[1,32,26,2,0,0,0,0]`, `labels=[32,26,2,0,0,0,0,0]`, `loss_mask=[F,T,T,F,F,F,F,F]`,
    `positions=[0,1,2,3,0,1,2,3]`, `cu_seqlens=[0,4]`, `cu_seqlens_padded=[0,4]`; the rest of the
    row is padding that belongs to no sequence.
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
    cu_seqlens_padded: (
        torch.Tensor
    )  # [S+1] int32, where each sequence starts in the row; lengths padded to 2 x CP


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """This rank's share of a global batch, an optimizer step a mini-batch. In each mini-batch every
    data-parallel rank holds the same number of micro-batches, filled up with fully masked ones.

    Example: one optimizer step on two rows: `TrainBatch(mini_batches=((MicroBatch(...),
    MicroBatch(...)),))`.
    """

    mini_batches: tuple[tuple[MicroBatch, ...], ...]
    # samples that only the discrepancy is measured on, as many rows on every rank; seldom any
    measured: tuple[MicroBatch, ...] = ()

    @property
    def parts(self) -> tuple[tuple[MicroBatch, ...], ...]:
        """The mini-batches, and behind them the measured rows where there are any."""
        return (*self.mini_batches, self.measured) if self.measured else self.mini_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one training step did, the same on every rank.

    Example: `StepReport(step=12, dual_value=0.104, metrics={"discrepancy/mean": 0.0041,
    "learner/grad_norm": 0.7})`.
    """

    step: int
    dual_value: float  # lambda after this step's dual update
    metrics: dict[str, float]
