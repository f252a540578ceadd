"""The commands of docs/first-run.md, run as they stand there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "first-run.md"
NUM_BLOCKS = 7
LAST_STEP = 40


def blocks() -> list[str]:
    """The shell commands of the page, in order."""
    return re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_blocks_are_found_and_name_files_that_exist() -> None:
    found = blocks()
    assert len(found) == NUM_BLOCKS
    named = set(re.findall(r"(?:tools|launch)/\w+\.\w+", "\n".join(found)))
    assert len(named) == 4
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.slow
def test_the_page_leads_to_a_trained_checkpoint(tmp_path: Path) -> None:
    # What the commands write is beside what they read, and not in the repository.
    for name in (".venv", "launch", "tools", "megatron_rl"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "set -euo pipefail\n" + "\n".join(blocks())
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "mine"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == LAST_STEP
    accuracy = [each["eval/subtraction/avg_at_4"] for each in (lines[0], lines[-1])]
    assert accuracy[1] > accuracy[0] + 0.1
    assert (run / "huggingface" / "config.json").is_file()
    assert list(run.glob("*.png"))
    (results,) = run.glob("evaluations/*/results.json")
    assert "subtraction" in results.read_text()
