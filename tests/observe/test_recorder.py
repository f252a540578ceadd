import io

from rich.console import Console

from megatron_rl.observe.recorder import Recorder
from megatron_rl.observe.run_log import read_metrics


def record(run_dir, *, rank, last_step, steps):
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    with Recorder(
        run_dir, rank=rank, num_steps=5, last_step=last_step, console=console
    ) as recorder:
        for step in steps:
            recorder.phase("rollout")
            recorder.write(step, {"reward/mean": step / 10})
        recorder.summarize(run_dir / "huggingface")
    return stream.getvalue()


def test_rank_0_writes_everything_and_goes_on_after_a_resume(tmp_path):
    record(tmp_path, rank=0, last_step=-1, steps=range(4))
    shown = record(tmp_path, rank=0, last_step=1, steps=range(2, 6))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 2
    assert shown.count("step ") == 4
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in shown
    assert f"model: {tmp_path / 'huggingface'}\n" in shown


def test_other_ranks_write_nothing(tmp_path):
    assert record(tmp_path / "run", rank=1, last_step=-1, steps=range(3)) == ""
    assert not (tmp_path / "run").exists()
