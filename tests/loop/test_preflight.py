"""Settings that only the model can tell wrong, found before a process is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import Config, EvalConfig, ModelConfig, RolloutConfig, SamplingConfig
from megatron_rl.errors import ConfigError
from megatron_rl.loop.preflight import prepare_data


@pytest.mark.parametrize("section", ["rollout", "eval"])
def test_a_stop_token_beyond_the_vocabulary(section: str, tiny_checkpoint: Path) -> None:
    fits = SamplingConfig(max_tokens=32, stop_token_ids=[127])
    config = Config(
        model=ModelConfig(path=str(tiny_checkpoint)),
        rollout=RolloutConfig(sampling=fits),
        eval=EvalConfig(sampling=fits),
    )
    with pytest.raises(ConfigError, match=r"data\.tasks: expected at least one"):  # comes later
        prepare_data(config)
    beyond = replace(getattr(config, section), sampling=replace(fits, stop_token_ids=[3, 128]))
    expected = rf"{section}\.sampling\.stop_token_ids: expected ids below .* 128, got 128"
    with pytest.raises(ConfigError, match=expected):
        prepare_data(replace(config, **{section: beyond}))
