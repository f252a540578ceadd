"""Which ranks send weights, by the transport."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config import Config, SyncConfig
from megatron_rl.loop import senders
from megatron_rl.loop.senders import make_contributor


@pytest.mark.parametrize(
    ("transport", "is_source", "replay", "sends"),
    [
        ("collective", True, "", True),
        ("collective", False, "", False),
        ("collective", True, "runs/a/rollouts", False),
        ("shared_memory", True, "", False),  # rank 0 sends all
    ],
)
def test_a_source_of_weights_contributes(
    transport: str, is_source: bool, replay: str, sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class NotedContributor:
        def __init__(self, config: SyncConfig, **parts: Any) -> None:
            assert parts["sources"] is not None

        def __enter__(self) -> NotedContributor:
            return self

        def __exit__(self, *error: object) -> None:
            ended.append("contributor")

    monkeypatch.setattr(senders, "Contributor", NotedContributor)
    monkeypatch.setattr(senders, "Sources", lambda group: SimpleNamespace(group=group))
    config = replace(Config(), sync=SyncConfig(transport=transport), replay=replay)
    parallel: Any = SimpleNamespace(is_weight_source=is_source, pp_size=1)
    with ExitStack() as stack:
        found = make_contributor(config, parallel, stack)
        assert (found is not None) == sends
    assert ended == (["contributor"] if sends else [])
