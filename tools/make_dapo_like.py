"""Writes a Parquet file in the layout of DAPO-Math-17k: about 1.8 million rows, 17,917 different.

    python tools/make_dapo_like.py OUT [--different 17917] [--times 100] [--row-group 1048576]

The published file repeats every problem a hundred times. This one has its columns, its nesting (a
list of chat messages; structs with the answer and an id) and its lengths of text, with sums in
place of the problems. The rows are shuffled; the same options give the same rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.errors import ConfigError, DataError
from megatron_rl.process.tool import run_tool

BATCH = 50_000  # rows that are made together
BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
TEXT = (
    "let the sequence of positive integers be defined so that every term is a sum of two earlier "
    "terms and find how many points of the plane lie on the circle through three vertices"
)


def make_problems(num_different: int, seed: int = 0) -> pa.Table:
    """[num_different] rows, each of another problem."""
    generator = np.random.default_rng(seed)
    vocabulary = TEXT.split()
    prompts, answers, ids = [], [], []
    for number in range(num_different):
        words = generator.choice(vocabulary, size=int(generator.integers(20, 100)))
        problem = f"Problem {number}: {' '.join(words)}. What is {number} + {number % 97}?"
        prompts.append([{"content": BEFORE + problem + AFTER, "role": "user"}])
        answers.append(str(number + number % 97))
        ids.append(generator.bytes(16).hex())
    return pa.table(
        {
            "data_source": ["math_dapo"] * num_different,
            "prompt": prompts,
            "ability": ["MATH"] * num_different,
            "reward_model": [
                {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"} for answer in answers
            ],
            "extra_info": [{"index": index} for index in ids],
        }
    )


def write_dapo_like(path: Path, *, num_different: int, num_times: int, row_group: int) -> int:
    """Write the file and return its number of rows."""
    problems = make_problems(num_different)
    partial = path.with_name(path.name + ".partial")
    with pq.ParquetWriter(partial, problems.schema) as writer:
        order = np.random.default_rng(1).permutation(num_different * num_times) % num_different
        for start in range(0, len(order), row_group):
            # A call makes a row group, so its batches are joined first.
            rows = order[start : start + row_group]
            pieces = np.array_split(rows, -(-len(rows) // BATCH))
            tables = [problems.take(pa.array(piece)) for piece in pieces]
            writer.write_table(pa.concat_tables(tables), row_group_size=row_group)
    partial.rename(path)
    return len(order)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the file; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--different", type=int, default=17_917, help="different rows")
    parser.add_argument("--times", type=int, default=100, help="how often each is there")
    parser.add_argument("--row-group", type=int, default=2**20, help="rows of a row group")
    options = parser.parse_args(arguments)
    return run_tool("make_dapo_like", lambda: _make(options))


def _make(options: argparse.Namespace) -> None:
    if options.out.is_dir():
        raise DataError(f"{options.out}: expected the name of a file to write, got a folder")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if min(options.different, options.times, options.row_group) < 1:
        raise ConfigError("--different, --times, --row-group: expected numbers of 1 or more")
    num_rows = write_dapo_like(
        options.out,
        num_different=options.different,
        num_times=options.times,
        row_group=options.row_group,
    )
    size = options.out.stat().st_size / 2**20
    print(f"{options.out}: {num_rows:,} rows, {options.different:,} different, {size:.0f} MiB")


if __name__ == "__main__":
    sys.exit(main())
