"""Rules between sections: what waits for freshly published weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rl.config import CheckpointConfig, Config, EvalConfig, LoopConfig, SyncConfig
from megatron_rl.errors import ConfigError


def test_what_needs_fresh_engines_falls_on_a_published_step() -> None:
    config = Config(
        sync=SyncConfig(every=4),
        checkpoint=CheckpointConfig(every=8),
        eval=EvalConfig(every=0),
        loop=LoopConfig(num_steps=12),
    )
    for section, key, value in (
        ("checkpoint", "every", 6),
        ("eval", "every", 2),
        ("loop", "num_steps", 10),
    ):
        changed = replace(getattr(config, section), **{key: value})
        expected = rf"{section}\.{key}: expected a multiple of sync\.every=4, .*got {value}"
        with pytest.raises(ConfigError, match=expected):
            replace(config, **{section: changed})
    with pytest.raises(ConfigError, match="every: expected at least 1"):
        SyncConfig(every=0)
