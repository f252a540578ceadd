"""What a server is started with."""

from __future__ import annotations

import pytest

from megatron_rl.config import RolloutConfig
from megatron_rl.engine.launch import server_command, server_environment


def test_the_token_is_in_the_environment_alone() -> None:
    environment = server_environment(RolloutConfig(), token="secret", update_timeout_seconds=7.5)
    assert environment["MEGATRON_RL_TOKEN"] == "secret"
    assert environment["MEGATRON_RL_UPDATE_TIMEOUT"] == "7.5"
    command = server_command(
        RolloutConfig(), model_path="m", port=5000, seed=3, weight_backend="backend"
    )
    assert not any("secret" in word for word in command)


def test_an_engine_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_ERROR_FILE")
    for name in (*names, "FRANK"):
        monkeypatch.setenv(name, "1")
    environment = server_environment(RolloutConfig(), token="t", update_timeout_seconds=1.0)
    assert not set(names) & set(environment)
    assert environment["FRANK"] == "1"


def test_settings_reach_the_command_line() -> None:
    config = RolloutConfig(
        dtype="float32", max_model_len=512, max_num_seqs=7, extra_args=["--swap-space", "0"]
    )
    command = server_command(config, model_path="m", port=5000, seed=3, weight_backend=None)
    for option, value in (
        ("--model", "m"),
        ("--host", "127.0.0.1"),
        ("--port", "5000"),
        ("--seed", "3"),
        ("--dtype", "float32"),
        ("--max-model-len", "512"),
        ("--max-num-seqs", "7"),
        ("--logprobs-mode", "processed_logprobs"),
        ("--middleware", "megatron_rl.engine.gate.Gate"),
    ):
        assert command[command.index(option) + 1] == value
    assert command[-2:] == ["--swap-space", "0"]  # last, so that they win
    assert "--weight-transfer-config" not in command
    with_weights = server_command(config, model_path="m", port=1, seed=3, weight_backend="ours")
    assert '{"backend": "ours"}' in with_weights
    for num_logprobs, expected in ((0, None), (19, None), (20, "21"), (32, "33")):
        command = server_command(
            config,
            model_path="m",
            port=1,
            seed=3,
            weight_backend=None,
            num_logprobs=num_logprobs,
        )
        found = None
        if "--max-logprobs" in command:
            found = command[command.index("--max-logprobs") + 1]
        assert found == expected, num_logprobs
    without_limit = server_command(
        RolloutConfig(), model_path="m", port=1, seed=3, weight_backend=None
    )
    assert "--max-model-len" not in without_limit


@pytest.mark.parametrize(("num_engines", "is_passive"), [(1, False), (2, True)])
def test_threads_spin_only_if_each_has_a_core(
    num_engines: int, is_passive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # a learner's; the engine does not inherit it
    config = RolloutConfig(num_engines=num_engines, num_threads=2)
    environment = server_environment(config, token="t", update_timeout_seconds=1.0)
    assert environment["OMP_NUM_THREADS"] == "2"
    assert (environment.get("OMP_WAIT_POLICY") == "passive") == is_passive
    assert ("GOMP_SPINCOUNT" in environment) == is_passive
