"""Measures how long two ranks take to their first prompt on a DAPO-like file, and their memory.

    python -m tools.bench_data [--file FILE] [--ranks 2] [key=value ...]

Without --file, a Parquet file of 1.8 million rows is written first (tools/make_dapo_like.py). Each
rank is a process of its own with the imports of `megatron_rl.train`; it does what a run does before
any process is started (`loop/preflight.py`) and takes the first step's prompts. The seconds count
from the start of the process; those of the CPU hardly depend on what else the machine does. The
memory is the largest resident size (VmHWM), and beside it the size with all imports before any
data.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.make_dapo_like import write_dapo_like

ROOT = Path(__file__).parents[1]
SETTINGS = """
run_dir: {folder}/run
model: {{path: {folder}/model}}
data:
  tasks:
    - name: dapo
      path: {file}
      prompt_column: prompt
      answer_column: reward_model.ground_truth
rollout: {{sampling: {{max_tokens: 1024}}}}
eval: {{sampling: {{max_tokens: 1024}}}}
"""


def run_rank(settings: Path, overrides: list[str]) -> None:
    """One rank: print its seconds and memory as JSON on the last line."""
    start = float(os.environ["BENCH_START"])
    import megatron_rl.train  # noqa: F401  (all that a rank imports)
    from megatron_rl.config.file import load_config
    from megatron_rl.loop.preflight import preflight

    num_imports, imported = time.time() - start, memory_mib("VmRSS")
    config = load_config(settings, overrides)
    stream = preflight(config).stream
    prompts = stream.prompts(0, config.loop.prompts_per_step)
    print(
        json.dumps(
            {
                "seconds_imports": num_imports,
                "seconds": time.time() - start,
                "cpu_seconds": time.process_time(),
                "mib_imports": imported,
                "mib": memory_mib("VmHWM"),
                "num_prompts": len(prompts),
            }
        )
    )


def memory_mib(field: str) -> float:
    """A size of this process in MiB: VmRSS is the resident size now, VmHWM the largest so far."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


def start_rank(rank: int, num_ranks: int, arguments: list[str]) -> subprocess.Popen[str]:
    """The process of one rank; the first one's progress goes to the terminal."""
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "BENCH_START": str(time.time()),
    }
    command = [sys.executable, __file__, "--as-rank", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def main() -> int:
    """Parse the command line, run the ranks together and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="a file in DAPO-Math-17k's layout")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    if options.as_rank:
        run_rank(options.as_rank, options.overrides)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or Path(folder) / "dapo.parquet"
        if not options.file:
            num_rows = write_dapo_like(file, num_different=17_917, num_times=100, row_group=2**20)
            print(f"wrote {num_rows:,} rows, {file.stat().st_size / 2**20:.0f} MiB")
        make_model = [sys.executable, str(ROOT / "tools" / "make_tiny_model.py"), f"{folder}/model"]
        subprocess.run([*make_model, "--context", "4096"], check=True, stdout=subprocess.DEVNULL)
        settings = Path(folder) / "run.yaml"
        settings.write_text(SETTINGS.format(folder=folder, file=file.resolve()))
        arguments = [str(settings), f"parallel.tensor={options.ranks}", *options.overrides]
        ranks = [start_rank(rank, options.ranks, arguments) for rank in range(options.ranks)]
        for rank, process in enumerate(ranks):
            *lines, figures = process.communicate()[0].strip().splitlines() or [""]
            if process.returncode:
                return process.returncode
            print("\n".join(lines))
            found = json.loads(figures)
            print(
                f"rank {rank}: first {found['num_prompts']} prompts after {found['seconds']:.1f} s "
                f"(imports {found['seconds_imports']:.1f} s, CPU {found['cpu_seconds']:.1f} s), "
                f"{found['mib']:.0f} MiB at most "
                f"(imports {found['mib_imports']:.0f} MiB)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
