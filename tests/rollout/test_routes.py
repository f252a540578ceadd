"""The experts of an engine's tokens: in answers, in recordings, in rows, and what is refused."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.engine.answers import read_routes
from megatron_rl.errors import DataError, EngineError
from megatron_rl.learner.batch.packing import pack
from megatron_rl.records import Prompt, Rollout, RolloutGroup, Sample, Score, ScoredGroup
from megatron_rl.rollout.recording import read_step, write_step
from megatron_rl.rollout.routes import check_routes, route_bytes
from tests.support.geometry import SMALL, small_experts

NUM_LAYERS, NUM_CHOSEN, NUM_EXPERTS = 2, 2, 300
GEOMETRY = replace(
    SMALL,
    model_type="qwen3_moe",
    num_layers=NUM_LAYERS,
    has_qk_norm=True,
    experts=small_experts(num_experts=NUM_EXPERTS, num_chosen=NUM_CHOSEN),
)


def rollout_of(length: int, *, largest: int = 7, has_routes: bool = True) -> Rollout:
    """A prompt of one token and a response, whose routes count up."""
    size = (length - 1, NUM_LAYERS, NUM_CHOSEN)
    routes = np.arange(np.prod(size)).reshape(size) % (largest + 1)
    return Rollout(
        token_ids=tuple(range(3, 3 + length)),
        loss_mask=(False,) + (True,) * (length - 1),
        rollout_logprobs=(0.0,) + (-1.0,) * (length - 1),
        weight_versions=(-1,) + (0,) * (length - 1),
        finish_reason="stop",
        text="",
        routes=routes if has_routes else None,
    )


def group_of(*rollouts: Rollout) -> RolloutGroup:
    prompt = Prompt(index=0, source="", text="", token_ids=(3,), answer="")
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


def encoded(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def test_routes_of_an_answer() -> None:
    routes = rollout_of(5).routes
    assert np.array_equal(read_routes(encoded(routes), "engine"), routes)
    assert read_routes(None, "engine") is None
    for wrong in ("nonsense", encoded(routes[0]), encoded(routes.astype(float))):
        with pytest.raises(EngineError, match="engine: expected routed experts"):
            read_routes(wrong, "engine")


@pytest.mark.parametrize(("largest", "size"), [(255, 1), (256, 2)])
def test_a_recording_keeps_routes_in_as_few_bytes_as_they_need(
    largest: int, size: int, tmp_path: Path
) -> None:
    rollouts = (rollout_of(100, largest=largest), rollout_of(3, has_routes=False), rollout_of(4))
    score = Score(reward=1.0, is_formatted=True, failure=None)
    judged = ScoredGroup(group=group_of(*rollouts), scores=(score,) * 3).without_judgement()
    write_step(tmp_path, 1, 0, [judged], num_ranks=1)
    [read] = read_step(tmp_path, 1)
    for found, expected in zip(read.group.rollouts, rollouts, strict=True):
        assert np.array_equal(found.routes, expected.routes)
    each = NUM_LAYERS * NUM_CHOSEN * size
    assert route_bytes(read.group.rollouts) == [99 * each, 3 * each]


def test_a_row_has_the_routes_of_its_rollouts() -> None:
    rollouts = (rollout_of(5), rollout_of(4, has_routes=False), rollout_of(3))
    samples = [
        Sample(prompt_index=0, sample_index=number, rollout=rollout, reward=0.0, advantage=0.0)
        for number, rollout in enumerate(rollouts)
    ]
    [row] = pack(samples, tokens_per_row=64)
    assert row.routes.shape == (64, NUM_LAYERS, NUM_CHOSEN)
    assert np.array_equal(row.routes[:4], rollouts[0].routes)
    assert (row.routes[4:9] == -1).all()  # the last token, and a rollout without
    assert np.array_equal(row.routes[9:11], rollouts[2].routes)
    assert (row.routes[11:] == -1).all()
    assert pack(samples[1:2], tokens_per_row=64)[0].routes is None


def test_routes_that_do_not_fit_the_model_are_refused() -> None:
    check_routes([group_of(rollout_of(5))], GEOMETRY, "replay")
    check_routes([group_of(rollout_of(5, has_routes=False))], None, "replay")
    sound = rollout_of(5)
    for rollout, words in (
        (replace(sound, routes=None), r"got none; start the engines with --enable-return-routed"),
        (replace(sound, routes=sound.routes[:3]), r"expected .* \[4, 2, 2\] .*, got \[3, 2, 2\]"),
        (replace(sound, routes=sound.routes + NUM_EXPERTS), "expected experts from 0 to 299, got"),
    ):
        with pytest.raises(DataError, match=words):
            check_routes([group_of(rollout)], GEOMETRY, "replay")
