from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl.observe.tensorboard import LAYOUT, TensorBoardWriter


def test_scalars_survive_a_resume_without_doubled_steps(tmp_path):
    first = TensorBoardWriter(tmp_path, purge_step=None)
    for step in range(4):
        first.write(step, {"reward/mean": step / 10})
    # Not closed: a killed process closes nothing, and every step was flushed.
    resumed = TensorBoardWriter(tmp_path, purge_step=2)
    resumed.write(2, {"reward/mean": 9.0})
    resumed.close()
    first.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("reward/mean")] == [
        (0, 0.0),
        (1, 0.1),
        (2, 9.0),
    ]


def test_the_custom_page_groups_the_curves():
    assert list(LAYOUT) == ["reward", "discrepancy and constraint", "learner", "speed"]
