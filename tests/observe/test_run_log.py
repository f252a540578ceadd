import json

import pytest

from megatron_rl.errors import DataError
from megatron_rl.observe.run_log import RunLog, read_metrics


def test_a_line_a_step_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, keep_through=-1) as log:
        log.write(0, {"reward/mean": 0.5})
        log.write(1, {"reward/mean": 1e-9, "learner/grad_norm": float("nan")})
        lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 0, "reward/mean": 0.5},
        {"step": 1, "reward/mean": 1e-9, "learner/grad_norm": None},
    ]


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with RunLog(path, keep_through=-1) as log:
        for step in range(5):
            log.write(step, {"a": step})
    with path.open("a") as file:
        file.write('{"step": 5, "a"')
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4]
    with RunLog(path, keep_through=2) as log:
        log.write(3, {"a": 30.0})
    assert [(r["step"], r["a"]) for r in read_metrics(path)] == [(0, 0), (1, 1), (2, 2), (3, 30.0)]


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"reward/mean": 1}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: expected"):
        read_metrics(path)
