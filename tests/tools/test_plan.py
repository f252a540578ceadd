"""What the tool prints of a plan, and what it says where a run does not fit or is not valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import plan

ROOT = Path(__file__).parents[2]
# Without what makes the run fit.
DAPO = [
    str(ROOT / "configs" / "dapo.yaml"),
    f"model.path={ROOT}/configs/shapes/Qwen3-8B",
    "parallel.sequence_parallel=false",
    "model.activation_recomputation=none",
]
GIVEN_ENGINES = ["rollout.num_engines=0", "rollout.urls=[http://127.0.0.1:8000]"]
SHORT = ["rollout.sampling.max_tokens=2048", "learner.tokens_per_micro_batch=4096"]


# Every configuration of a cluster: (file, nodes, GPUs of a node, GPUs of a replica, replicas).
SHIPPED = [
    ("dapo", 1, 8, 4, 2),
    ("dapo_fp8", 1, 8, 4, 2),
    ("dapo_4_nodes", 4, 8, 2, 16),
    ("dapo_4_nodes_fp8", 4, 8, 2, 16),
    ("llama_8b", 1, 8, 4, 2),
    ("gsm8k", 1, 1, 1, 1),
    ("gsm8k", 1, 8, 1, 8),
]


@pytest.mark.parametrize(("name", "nodes", "gpus", "tensor", "data"), SHIPPED)
def test_the_shipped_configurations_fit(
    name: str,
    nodes: int,
    gpus: int,
    tensor: int,
    data: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As they are; the models, which are not there, by their shapes."""
    monkeypatch.chdir(tmp_path)
    sizes = ["--nodes", str(nodes), "--gpus-per-node", str(gpus)]
    assert plan.main([str(ROOT / "configs" / f"{name}.yaml"), *sizes]) == 0
    printed = capsys.readouterr().out
    assert "is not there; planned with the shape in" in printed
    ranks = f"{nodes * gpus} ranks on {nodes} node(s)"
    assert f"{ranks} = tensor {tensor} x context 1 x pipeline 1 x data {data}" in printed
    assert printed.count(" GB, fits") == 2


def test_a_run_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*DAPO, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "8,190,735,360 parameters" in printed
    assert "8 ranks on 1 node(s) = tensor 4 x context 1 x pipeline 1 x data 2" in printed
    # 14 bytes of each parameter; 4 ranks write two files each, and all 8 their random state.
    assert "checkpoint: 20 files, 114,670,295,040 bytes each" in printed
    assert "sync: 399 tensors, 16,381,470,720 bytes" in printed
    assert "DOES NOT FIT" not in printed
    assert "change:" not in printed


def test_the_mixture_of_experts_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "dapo_30b_a3b.yaml")
    model = f"model.path={ROOT}/configs/shapes/Qwen3-30B-A3B"
    assert plan.main([config, model, "--nodes", "4"]) == 0
    printed = capsys.readouterr().out
    assert "30,532,122,624 parameters" in printed
    # Of each rank 1/8 of 28,991,029,248 parameters of experts and 1/2 of most others.
    assert re.search(r"learner +weights +8\.80\n", printed)
    # Each engine is divided among 4 GPUs.
    assert re.search(r"engine +weights +15\.27\n", printed)
    assert "training: 75.4 of 80 GB, fits" in printed
    # Without expert parallelism every rank holds all experts.
    assert plan.main([config, model, "--nodes", "4", "parallel.expert=1"]) == 1
    assert "parallel.expert=8: 75.4 GB" in capsys.readouterr().out


def test_a_setting_that_would_be_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(DAPO) == 1
    printed = capsys.readouterr().out
    assert "training: 86.1 of 80 GB, DOES NOT FIT" in printed
    for change in ("parallel.tensor=8: 71.9", "model.activation_recomputation=full: "):
        assert f"\n  {change}" in printed.partition("change: one of these is enough:")[2]
        assert plan.main([*DAPO, change.partition(": ")[0]]) == 0


def test_several_settings_that_are_enough_together(capsys: pytest.CaptureFixture[str]) -> None:
    small = [*DAPO, *SHORT, *GIVEN_ENGINES, "parallel.tensor=1", "--nodes", "4", "--gpu-gb", "24"]
    assert plan.main([*small, "learner.optimizer.distributed=false"]) == 1
    printed = capsys.readouterr().out
    found = re.search(r"all of these together are enough:\n((?:  \S+=\S+: .* GB\n)+)", printed)
    assert found is not None
    changes = [line.split(": ")[0].strip() for line in found[1].splitlines()]
    assert changes == ["learner.optimizer.distributed=true", "parallel.tensor=8"]
    assert plan.main([*small, *changes]) == 0


def test_an_engine_without_room_for_one_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*DAPO, "--gpu-gb", "48"]) == 1
    expected = (
        r"rollout.gpu_memory_utilization: expected at least 0\.46, .*16\.4 GB .* 5\.1 GB, got"
    )
    assert re.search(expected, capsys.readouterr().err)


def test_no_setting_of_the_layout_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*DAPO, *GIVEN_ENGINES, "--gpu-gb", "16"]) == 1
    printed = capsys.readouterr().out
    assert "no setting of the layout is enough" in printed
    assert "activations, 26.8 GB: lower rollout.sampling.max_tokens" in printed


def test_all_problems_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["parallel.tensor=3", "parallel.pipeline=5", "rollout.max_model_len=50000"]
    assert plan.main([*DAPO, *wrong]) == 1
    printed = capsys.readouterr().err
    assert "parallel.tensor=3 does not divide the model's 32 attention heads" in printed
    assert (
        "expected a world size that is a multiple of tensor x context x pipeline = 15, got 8"
        in printed
    )
    assert "expected at most the model's 40960 positions, got 50000" in printed


def test_too_many_ranks_to_simulate(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*DAPO, *SHORT, *GIVEN_ENGINES, "--simulate", "--nodes", "65"]) == 1
    assert "--simulate: expected at most 512 ranks, got 520" in capsys.readouterr().err


# By hand, in GB: the learner has weights 4.10, gradients 8.19, optimizer's state 12.29 (24.58 with
# one replica), activations and logits 11.34 and NCCL with CUDA 1.20; an engine has 32, which is 0.4
# of the GPU, and 0.6 for CUDA while it sleeps.
PLACES = [
    ("auto", 2, 69.1, 57.8),  # 4.10 + 8.19 + 12.29 + 11.34 + 1.20 + 32; without the activations
    ("colocated", 2, 37.7, 37.3),  # 37.12 + 0.6; 4.10 + 1.20 + 32
    ("share", 1, 49.2, 37.9),  # 4.10 + 8.19 + 24.58 + 11.34 + 1.00; without the activations
]


@pytest.mark.parametrize(("placement", "data", "training", "rollout"), PLACES)
def test_engines_beside_the_learner_or_in_turns_or_on_other_gpus(
    placement: str, data: int, training: float, rollout: float, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [f"rollout.placement={placement}", "rollout.num_engines=4"]
    assert plan.main([*DAPO, *SHORT, *place]) == 0
    printed = capsys.readouterr().out
    assert f"{4 * data} ranks on 1 node(s) = tensor 4 x" in printed
    assert f"training: {training} of 80 GB, fits" in printed
    assert f"rollout: {rollout} of 80 GB, fits" in printed
    assert ("engine   on GPUs of its own" in printed) == (placement == "share")


def test_engines_that_leave_the_learner_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["rollout.placement=share", "rollout.num_engines=2", "rollout.tensor_parallel=4"]
    assert plan.main([*DAPO, *place]) == 1
    assert "expected engines that leave GPUs of each node to the learner" in capsys.readouterr().err
