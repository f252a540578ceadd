"""The parity probe after each weight sync: does every engine serve the weights that were published?

Two findings end a run: new samples of an engine differ from the learner's log-probs by more than
rounding (`sync/probe.py`), or an engine's log-probs of given tokens did not change when the
learner's did (`sync/change.py`); the given tokens are those of the probe before. Before the run
ends, the probe asks again with more tokens.

Rank 0 asks the engines, all ranks compute the learner's log-probs, and the last pipeline stage of
the first replica decides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_rl.config import Config
from megatron_rl.errors import EnginesLostError, SyncError
from megatron_rl.learner.batch.deal import unscored_samples
from megatron_rl.learner.learner import Learner
from megatron_rl.loop.link import EngineLink
from megatron_rl.objective.discrepancy import constrained_signal
from megatron_rl.objective.fresh_gap import FRESH_GAP
from megatron_rl.records import Sample
from megatron_rl.rollout.live import sample_groups
from megatron_rl.rollout.seeds import sampling_seed
from megatron_rl.sync.change import ChangeReport, Scores, compare_changes
from megatron_rl.sync.probe import (
    ParityReport,
    Precisions,
    compare_engines,
    engine_precision,
    prompt_of,
)

PROMPTS = 8  # per engine; one sample of each
FIRST_GIVEN = 4  # sequences per engine whose change is looked at first; of PROMPTS when in doubt
MORE = 4  # times as many tokens are sampled when in doubt
MAX_ROUNDS = 4  # in which the tokens are sampled
MAX_PROMPTS = 64  # per engine and round
OLD, NEW = 0, 1  # the age of given tokens: of the update before, of this one

Pairs = list[tuple[Sample, torch.Tensor]]  # samples with the learner's log-probs, [L] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the last stage of the first replica found, on all ranks.

    Example: `Findings(figures={"sync/probe_gap/mean": 0.004}, complaint="", is_doubtful=False)`.
    """

    figures: dict[str, float]
    complaint: str  # "": no engine is certainly wrong
    is_doubtful: bool  # more tokens may show that an engine is wrong


class ParityProbe:
    """The probe of a run, on every rank. It remembers the samples of the last update, whose tokens
    are the given tokens of the next one.

    Args:
        link: on rank 0; None on every other rank.
    """

    def __init__(self, learner: Learner, link: EngineLink | None, config: Config) -> None:
        self._learner, self._link, self._config = learner, link, config
        self._urls: tuple[str, ...] = ()  # of the engines that served when the probe began
        self._precisions = Precisions(
            engine=engine_precision(config.rollout),
            learner=config.model.dtype,
            tolerance=config.sync.probe_tolerance,
        )
        self._num_prompts = PROMPTS  # per engine; more if responses are short
        self._checksum = ""  # of the last update
        self._given: list[Sample] = []  # on rank 0
        self._before: dict[int, Scores] = {}  # of the given tokens by index, on the last stages

    def check(self, version: int, checksum: str) -> dict[str, float] | None:
        """Compare every engine with the learner, whose weights have just been published. A
        collective over all ranks.

        Args:
            checksum: of the bytes that were sent; read on rank 0.

        Returns:
            The figures, the same on every rank; None if an engine was lost on the way.

        Raises:
            SyncError: an engine does not serve the published weights.
        """
        parallel, pool = self._learner.parallel, self._link and self._link.pool
        has_new_bytes, urls = parallel.from_first_rank(
            (checksum != self._checksum, pool.urls if pool is not None else ())
        )
        if urls != self._urls:
            self._urls, self._given, self._before = urls, [], {}
        num_first, num_tokens = FIRST_GIVEN * len(urls), self._config.sync.probe_num_tokens
        first, rest = self._given[:num_first], self._given[num_first:]
        asked = self._ask(version, 0, self._num_prompts, num_tokens, first, with_new=True)
        if parallel.from_first_rank(asked is None):
            return None
        samples, served = asked
        scores, pairs = self._scores(served), self._learned(samples)
        findings = self._find(version, pairs, [], scores, has_new_bytes)
        if findings.is_doubtful:
            start, many = len(samples), MORE * self._num_prompts
            asked = self._ask(version, start, many, MORE * num_tokens, rest, with_new=False)
            if parallel.from_first_rank(asked is None):
                return None
            more, served = asked
            scores |= self._scores(served)
            findings = self._find(version, pairs, self._learned(more), scores, has_new_bytes)
        if findings.complaint:
            raise SyncError(findings.complaint)
        self._adapt(samples[: PROMPTS * len(urls)])
        self._checksum = checksum
        new = given_tokens(samples[: PROMPTS * len(urls)])
        self._given = [replace(sample, sample_index=OLD) for sample in new]
        self._before = {index: each for (index, age), each in scores.items() if age == NEW}
        return findings.figures

    def _ask(
        self,
        version: int,
        start: int,
        num_prompts: int,
        num_tokens: int,
        given: Sequence[Sample],
        *,
        with_new: bool,
    ) -> tuple[list[Sample], list[Sample]] | None:
        """What the engines sample, and the log-probs that they give to given tokens; empty on ranks
        without engines, and None if an engine is left out meanwhile.

        Args:
            given: samples whose tokens are scored.
            with_new: whether the tokens of the new samples are scored, too.
        """
        if self._link is None:
            return [], []
        try:
            samples = self._sample(version, start, num_prompts, num_tokens)
            new = given_tokens(samples[: PROMPTS * len(self._urls)]) if with_new else []
            served = self._served([*given, *new])
        except EnginesLostError:
            return None
        return (samples, served) if self._link.pool.urls == self._urls else None

    def _sample(self, version: int, start: int, num_prompts: int, num_tokens: int) -> list[Sample]:
        """Short samples, the same number from every engine, until each engine has sampled
        `num_tokens`; [] on ranks without engines.

        They are drawn from the whole distribution, even if the run's sampling truncates it:
        rounding may move a token across the edge of a truncated support, and then all log-probs at
        that position would change by more than rounding. Nothing ends them early, except the
        model's own end-of-sequence token.

        Args:
            start: the first prompt; a multiple of the number of engines.
            num_prompts: of the first round, per engine.
        """
        if self._link is None:
            return []
        link, sampling, seed = self._link, self._config.rollout.sampling, self._config.loop.seed
        length = math.ceil(self._config.sync.probe_num_tokens / PROMPTS)
        whole = replace(
            sampling,
            max_tokens=min(length, sampling.max_tokens),
            min_tokens=0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            stop=[],
            stop_token_ids=[],
        )
        samples: list[Sample] = []
        for _ in range(MAX_ROUNDS):
            count = min(num_prompts, MAX_PROMPTS) * len(self._urls)
            prompts = link.prompts(start + len(samples), count)
            groups = sample_groups(
                link.pool,
                link.environment,
                prompts,
                whole,
                num_samples=1,
                seeds=[sampling_seed(seed, version, prompt.index) for prompt in prompts],
            )
            samples += unscored_samples(groups)
            missing = num_tokens - _tokens_per_engine(samples, self._urls)
            if missing <= 0:
                break
            num_prompts = math.ceil(missing / _tokens_per_sample(samples))
        return samples

    def _adapt(self, samples: Sequence[Sample]) -> None:
        """Ask for as many prompts next time as would have been enough now.

        Args:
            samples: the first `PROMPTS` of each engine. A resumed run's first probe has these in
                common with the probe of the run that was not stopped, but not how many more it
                asks for.
        """
        if samples:
            enough = math.ceil(self._config.sync.probe_num_tokens / _tokens_per_sample(samples))
            self._num_prompts = min(max(PROMPTS, enough), MAX_PROMPTS)

    def _served(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the engines' log-probs. Sample i is scored by engine i modulo the number
        of engines, so all of an engine's samples keep their engine if parts begin at multiples of
        it.
        """
        if self._link is None or not samples:
            return []
        served = self._link.pool.score([each.rollout.token_ids.tolist() for each in samples])
        return [
            replace(each, rollout=replace(each.rollout, rollout_logprobs=values))
            for each, values in zip(samples, served, strict=True)
        ]

    def _scores(self, served: Sequence[Sample]) -> dict[tuple[int, int], Scores]:
        """The scores of given tokens on both sides, by index and age; filled on the last stages.

        Args:
            served: read on rank 0.
        """
        # The engines score at temperature 1, whatever the policy's temperature is.
        return {
            (sample.prompt_index, sample.sample_index): Scores(
                learner=learned[1:].double(),
                engine=torch.from_numpy(sample.rollout.rollout_logprobs)[1:],
            )
            for sample, learned in self._learned(served, temperature=1.0)
        }

    def _learned(self, samples: Sequence[Sample], temperature: float | None = None) -> Pairs:
        tokens_per_row = self._config.learner.tokens_per_micro_batch
        return self._learner.score_samples(
            samples, tokens_per_row=tokens_per_row, temperature=temperature
        )

    def _find(
        self,
        version: int,
        pairs: Pairs,
        more: Pairs,
        scores: dict[tuple[int, int], Scores],
        has_new_bytes: bool,
    ) -> Findings:
        """What the last stage finds, the same on every rank.

        Args:
            more: samples of the second time that the probe asks; [] the first time.
        """
        parallel = self._learner.parallel
        findings = None
        if parallel.is_last_stage:
            is_again = bool(more)
            try:
                gaps = self._gaps(version, [*pairs, *more])
                wrong = gaps
                if is_again and self._precisions.is_exact:
                    first, second = self._gaps(version, pairs), self._gaps(version, more)
                    wrong = {url: second[url] for url in gaps if first[url].is_certain}
                changes = self._changes(scores, has_new_bytes)
                complaints = [
                    f"engine {url} after update {version}: {report.complaint()}"
                    for url, report in (
                        *((url, each) for url, each in changes.items() if each.is_stale),
                        *((url, each) for url, each in wrong.items() if each.is_certain),
                    )
                ]
                is_doubtful = bool(complaints) or any(each.is_above for each in gaps.values())
                findings = Findings(
                    figures=figures_of(gaps.values(), changes.values())
                    | {FRESH_GAP: self._fresh_gap(pairs)},
                    complaint=complaints[0] if complaints else "",
                    is_doubtful=is_doubtful,
                )
            except SyncError as error:  # told by every rank alike
                findings = Findings(figures={}, complaint=str(error), is_doubtful=False)
        return parallel.from_first_rank(parallel.from_last_stage(findings))

    def _gaps(self, version: int, pairs: Pairs) -> dict[str, ParityReport]:
        return compare_engines(pairs, urls=self._urls, version=version, precisions=self._precisions)

    def _fresh_gap(self, pairs: Pairs) -> float:
        """The mean of the constrained signal over the tokens of all engines."""
        measure, signals = self._config.objective.constraint.measure, []
        for sample, learned in sorted(pairs, key=lambda pair: pair[0].prompt_index):
            mask = torch.from_numpy(sample.rollout.loss_mask)
            served = torch.from_numpy(sample.rollout.rollout_logprobs).float()[mask]
            signals.append(constrained_signal(learned[mask], served, measure=measure))
        return float(torch.cat(signals).double().mean())

    def _changes(
        self, scores: dict[tuple[int, int], Scores], has_new_bytes: bool
    ) -> dict[str, ChangeReport]:
        """The changes of each engine's given tokens, by url; empty without an earlier update."""
        reports = {}
        for number, url in enumerate(self._urls):
            own = [
                index
                for index in sorted(self._before)
                if index % len(self._urls) == number and (index, OLD) in scores
            ]
            if own:
                reports[url] = compare_changes(
                    [self._before[index] for index in own],
                    [scores[index, OLD] for index in own],
                    has_new_bytes=has_new_bytes,
                    is_exact_learner=self._precisions.learner == "float32",
                )
        return reports


def given_tokens(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose tokens, those of the prompt included, can be scored on both sides.

    Their last token is left out, since an engine has no room for another one after a response that
    fills the model's context, and samples one even when it scores.

    Of samples of one prompt, as a data set with few prompts has them, the second is rotated by one
    place, the third by two, and so on: the same tokens at the same places would repeat one piece of
    evidence, which `sync/ratios.py` would take for several. Routes to be replayed fix the places.
    """
    given = []
    num_of_prompt: Counter[bytes] = Counter()
    for index, sample in enumerate(samples):
        length = max(2, len(sample.rollout.token_ids) - 1)
        token_ids = sample.rollout.token_ids[:length]
        if sample.rollout.routes is None:
            prompt = prompt_of(sample.rollout)
            token_ids = np.roll(token_ids, -num_of_prompt[prompt])
            num_of_prompt[prompt] += 1
        mask = np.ones(length, dtype=bool)
        mask[0] = False  # nothing predicts the first token
        rollout = replace(
            sample.rollout,
            token_ids=token_ids,
            loss_mask=mask,
            rollout_logprobs=np.zeros(length),
            weight_versions=sample.rollout.weight_versions[:length],
            head=None,
        )
        given.append(replace(sample, prompt_index=index, sample_index=NEW, rollout=rollout))
    return given


def figures_of(gaps: Iterable[ParityReport], changes: Iterable[ChangeReport]) -> dict[str, float]:
    """The figures of the engine that differs most; those of the changes if there are any."""
    gaps, changes = list(gaps), list(changes)
    worst = max(gaps, key=lambda each: each.mean_probability_gap)
    figures = {
        "sync/probe_gap/mean": worst.mean_probability_gap,
        "sync/probe_gap/max": max(each.max_probability_gap for each in gaps),
        "sync/probe_relative_logprob_gap/max": max(each.max_relative_logprob_gap for each in gaps),
        "sync/probe_tokens/min": float(min(each.num_tokens for each in gaps)),
    }
    if math.isfinite(worst.standard_error):
        figures["sync/probe_gap/standard_error"] = worst.standard_error
    if changes:
        least = min(changes, key=lambda each: each.ratio)
        figures |= {
            "sync/probe_change_ratio/min": least.ratio,
            "sync/probe_learner_change/rms": least.learner_change,
            "sync/probe_engine_change/rms": least.engine_change,
            "sync/probe_is_telling/min": float(all(each.is_telling for each in changes)),
        }
    return figures


def _tokens_per_engine(samples: Sequence[Sample], urls: Sequence[str]) -> int:
    """The response tokens of the engine that sampled the fewest."""
    counts = dict.fromkeys(urls, 0)
    for sample in samples:
        engine = sample.rollout.engine
        counts[engine] = counts.get(engine, 0) + sample.rollout.num_response_tokens
    return min(counts[url] for url in urls)


def _tokens_per_sample(samples: Sequence[Sample]) -> float:
    """The mean length of a response, at least 1: every sample has a token."""
    return max(1.0, sum(each.rollout.num_response_tokens for each in samples) / len(samples))
