"""What only the model or the data can tell wrong, found before a process is started."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config import (
    AcceptanceConfig,
    Config,
    DataConfig,
    EvalConfig,
    KLConfig,
    ModelConfig,
    ObjectiveConfig,
    RolloutConfig,
    SamplingConfig,
    SyncConfig,
    TaskConfig,
)
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.loop.preflight import (
    check_engine_place,
    check_gpus,
    check_reference,
    check_replay,
    preflight,
    prepare_data,
)
from megatron_rl.process import packages
from megatron_rl.process.node import Node
from megatron_rl.weights.geometry import read_geometry


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


@pytest.mark.parametrize(
    ("verifier", "row"),
    [
        ("exact", r'{"question":"\ud83d 1+1","answer":"2"}'),
        ("exact", r'{"question":"1+1","answer":"\udfff"}'),
        ("numeric", '{"question":"1+1","answer":NaN}'),
        ("math_verify", '{"question":"1+1","answer":NaN}'),
        ("numeric", '{"question":"1+1","answer":1e400}'),
        ("exact", '{"question":"1+1","answer":-1e999}'),
        ("exact", '{"question":"1+1","answer":""}'),
        ("auto", r'{"question":"1+1","answer":" \t"}'),
        ("numeric", '{"question":"1+1","answer":"blue"}'),
        ("exact", '{"question":"1+1","answer":null}'),
        ("exact", '{"question":"1+1","answer":{"value":2}}'),
    ],
)
def test_a_row_that_no_run_can_use_ends_the_run_before_it_starts(
    verifier: str, row: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question":"1+1","answer":2}\n' + row + "\n")
    task = TaskConfig(path=str(path), verifier=verifier)
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint)),
        data=DataConfig(tasks=[task], num_held_out=0),
        rollout=RolloutConfig(sampling=SamplingConfig(max_tokens=32)),
        eval=EvalConfig(sampling=SamplingConfig(max_tokens=32)),
    )
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: ") as caught:
        preflight(config)
    assert "\n" not in str(caught.value)
    path.write_text('{"question":"1+1","answer":2}\n')
    assert len(preflight(config).stream.prompts(0, 1)) == 1


def test_a_reference_that_is_not_there_is_told_by_its_setting(tiny_checkpoint: Path) -> None:
    geometry = read_geometry(tiny_checkpoint)
    kl = KLConfig(coefficient=0.1, reference="/nowhere")
    config = replace(Config(), objective=ObjectiveConfig(kl=kl))
    with pytest.raises(DataError, match=r"^objective\.kl\.reference: expected a Hugging Face che"):
        check_reference(config, geometry)


def test_a_replay_without_a_recorded_step_ends_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    config = Config(run_dir=str(tmp_path / "run"), replay=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^replay=.*: expected a run's rollouts/ .* step$"):
        check_replay(config)
    (tmp_path / "step_000007.rank0.safetensors").write_text("")
    check_replay(config)


def test_engines_on_several_hosts_need_a_transport_that_goes_there() -> None:
    config = Config(rollout=RolloutConfig(num_engines=2))
    check_engine_place(config, world_size=8, local_world_size=8)
    with pytest.raises(ConfigError, match=r"got engines on 2 hosts; choose sync\.transport=coll"):
        check_engine_place(config, world_size=16, local_world_size=8)
    far = replace(config, sync=SyncConfig(transport="collective"))
    check_engine_place(far, world_size=16, local_world_size=8)
    one = replace(config, rollout=RolloutConfig(num_engines=1))  # on the host of rank 0
    check_engine_place(one, world_size=16, local_world_size=8)


def test_too_few_gpus_are_found_before_a_process_is_started() -> None:
    config = Config(rollout=RolloutConfig(num_engines=3, tensor_parallel=4))
    node = Node(index=0, count=1, num_ranks=8)
    with pytest.raises(ConfigError, match="expected 12 GPUs on node 0 for 3 engines"):
        check_gpus(config, node, 8)
    check_gpus(replace(config, replay="runs/a/rollouts"), node, 8)
    over_ipc = Config(sync=SyncConfig(transport="ipc"))
    with pytest.raises(ConfigError, match=r"sync\.transport=ipc: expected .* on GPUs, got none"):
        check_gpus(over_ipc, node, 0)
    check_gpus(over_ipc, node, 9)


def test_a_run_that_starts_engines_needs_vllm(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question":"1+1","answer":2}\n')
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_checkpoint)),
        data=DataConfig(tasks=[TaskConfig(path=str(path), verifier="exact")], num_held_out=0),
        rollout=RolloutConfig(sampling=SamplingConfig(max_tokens=32)),
        eval=EvalConfig(sampling=SamplingConfig(max_tokens=32)),
    )
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        packages.importlib.util, "find_spec", lambda n: None if n == "vllm" else find_spec(n)
    )
    with pytest.raises(ConfigError, match=r"num_engines: expected the packages vllm .* got none"):
        preflight(config)
    preflight(replace(config, rollout=replace(config.rollout, placement="nodes")))


def test_an_engine_that_judges_updates_needs_a_position_more(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question":"1+1","answer":2}\n')
    config = Config(
        model=ModelConfig(path=str(tiny_checkpoint)),
        data=DataConfig(
            tasks=[TaskConfig(path=str(path), verifier="exact")],
            num_held_out=0,
            max_prompt_tokens=24,
        ),
        rollout=RolloutConfig(max_model_len=32, sampling=SamplingConfig(max_tokens=8)),
        eval=EvalConfig(sampling=SamplingConfig(max_tokens=8)),
    )
    prepare_data(config)  # 24 + 8 tokens fill the context
    judged = replace(
        config, objective=replace(config.objective, acceptance=AcceptanceConfig(enabled=True))
    )
    with pytest.raises(ConfigError, match=r"context of 32 less one position"):
        prepare_data(judged)
    prepare_data(replace(judged, data=replace(config.data, max_prompt_tokens=23)))
