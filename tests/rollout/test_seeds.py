"""Seeds leave room for the samples of a prompt, also in the 32 bits that a CPU generator uses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_rl.config import SamplingConfig
from megatron_rl.records import MAX_SAMPLES
from megatron_rl.rollout import seeds as seeds_module
from megatron_rl.rollout.environment import EpisodeRequest
from megatron_rl.rollout.seeds import EVAL_STEP, evaluation_seeds, sampling_seed


def test_seeds_leave_room_for_samples() -> None:
    for step in range(3):
        seeds = [sampling_seed(11, step, index) for index in range(2000)]
        assert all(0 <= seed < 2**63 for seed in seeds)
        # A CPU generator reads the low 32 bits only.
        generator = torch.Generator()
        low = [seed % 2**32 for seed in seeds]
        first = [torch.rand(1, generator=generator.manual_seed(s)) for s in (seeds[0], low[0])]
        assert first[0] == first[1]
        taken = {(seed + sample) % 2**32 for seed in seeds for sample in (0, MAX_SAMPLES - 1)}
        assert len(taken) == 2 * len(seeds)
        rows = sorted(low)
        assert all(b - a >= MAX_SAMPLES for a, b in pairwise(rows))
    assert sampling_seed(11, 0, 5) == sampling_seed(11, 0, 5)
    assert len({sampling_seed(run, step, 5) for run in range(9) for step in range(9)}) == 81


def test_seeds_stay_what_they_were() -> None:
    """Recorded runs can be sampled again."""
    assert sampling_seed(0, 1, 0) == 8_944_392_749_622_110_464
    assert sampling_seed(7, -1, 123) == 8_579_740_627_110_681_344


def test_the_seeds_of_turns_differ_and_stay_the_prompts_own() -> None:
    request = EpisodeRequest(num_samples=8, seed=256, sampling=SamplingConfig())
    seeds = [request.seed_of(sample, turn) for turn in range(32) for sample in range(8)]
    assert seeds == list(range(256, 512))  # all that the prompt owns, each once
    with pytest.raises(ValueError, match="samples x turns of at most 256"):
        request.seed_of(0, 32)


def places_of(seeds: list[int]) -> set[int]:
    """What a CPU generator reads of the seeds of all samples."""
    return {(seed + sample) % 2**32 for seed in seeds for sample in range(MAX_SAMPLES)}


def test_the_seeds_of_evaluation_sets_do_not_collide() -> None:
    for run_seed in range(20):
        sets = {"": range(200), "aime24": range(30), "aime25": range(30), "math500": range(500)}
        seeds = evaluation_seeds(run_seed, sets)
        assert {name: len(of_set) for name, of_set in seeds.items()} == {
            name: len(indices) for name, indices in sets.items()
        }
        every = [seed for of_set in seeds.values() for seed in of_set]
        assert all(0 <= seed < 2**63 and seed % MAX_SAMPLES == 0 for seed in every)
        assert len(places_of(every)) == 760 * MAX_SAMPLES
        assert seeds[""] == [sampling_seed(run_seed, EVAL_STEP, index) for index in range(200)]


def test_the_seeds_of_a_set_depend_on_neither_the_other_sets_nor_the_other_rows() -> None:
    whole = evaluation_seeds(3, {"a": range(100), "b": range(100)})
    assert evaluation_seeds(3, {"b": range(100)})["b"] == whole["b"]
    assert evaluation_seeds(3, {"b": [7, 40]})["b"] == [whole["b"][7], whole["b"][40]]
    assert set(whole["a"]).isdisjoint(whole["b"])
    assert evaluation_seeds(4, {"b": [7]})["b"] != [whole["b"][7]]


def test_sets_that_would_collide_are_moved_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64 places for three sets of 10, two of them meet for most run seeds."""
    monkeypatch.setattr(seeds_module, "_NUM_PLACES", 64)
    num_moved = 0
    for run_seed in range(50):
        seeds = evaluation_seeds(run_seed, {name: range(10) for name in "abc"})
        assert len({seed % 2**32 for of_set in seeds.values() for seed in of_set}) == 30
        alone = {name: evaluation_seeds(run_seed, {name: range(10)})[name] for name in "abc"}
        num_moved += alone != seeds
    assert 20 < num_moved < 50
    with pytest.raises(ValueError, match="expected at most 32 prompts in all evaluation sets"):
        evaluation_seeds(0, {"a": range(33)})
