"""A small file in the layout of DAPO-Math-17k, and what one rank of the benchmark says of it."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tools import bench_data, make_tiny_model
from tools.make_dapo_like import write_dapo_like


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dapo.parquet"
    assert write_dapo_like(path, num_different=90, num_times=4, row_group=100) == 360
    return path


def test_the_file_has_the_published_layout(file: Path):
    metadata = pq.ParquetFile(file).metadata
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert groups == [100, 100, 100, 60]
    rows = pq.read_table(file).to_pylist()
    assert rows[0].keys() == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    [message] = rows[0]["prompt"]
    assert message["role"] == "user" and "Answer: $Answer" in message["content"]
    indices = [row["extra_info"]["index"] for row in rows]
    assert len(set(indices)) == 90 and all(indices.count(index) == 4 for index in indices)
    assert indices[:90] != indices[90:180]  # shuffled


def test_a_rank_reports_its_first_prompts(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("BENCH_START", "0")
    settings = tmp_path / "run.yaml"
    text = bench_data.SETTINGS.format(folder=tmp_path, file=file)
    settings.write_text(text)
    options = "--hidden 32 --layers 1 --heads 1 --kv-heads 1 --context 2048"
    assert make_tiny_model.main([f"{tmp_path}/model", *options.split()]) == 0
    capsys.readouterr()
    bench_data.run_rank(settings, ["data.num_held_out=20"])
    notice, figures = capsys.readouterr().out.strip().splitlines()
    assert notice.startswith("dapo: 360 rows, 90 different; 270 with the prompt and answer")
    found = json.loads(figures)
    assert found["num_prompts"] == 64 and 0 < found["mib_imports"] <= found["mib"]
