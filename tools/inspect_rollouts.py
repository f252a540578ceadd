"""Shows samples of a run in the terminal, each token coloured by its discrepancy |p_train - p_inf|.

The colours are relative to the tolerance of the run, or, if it constrains another signal than the
discrepancy, to the default tolerance. Without colours (`--no-color`, or into a pipe)
every token is a line of numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rl.config import ConstraintConfig
from megatron_rl.config.file import load_config
from megatron_rl.errors import DataError
from megatron_rl.process.tool import run_tool
from megatron_rl.rollout.recording import read_recomputed
from megatron_rl.rollout.recording import read_samples as read_recorded

SHOWN = 40  # characters of a response in its heading
# (largest multiple of the tolerance, style of the tokens up to it)
SHADES = (
    (1.0, "black on #b7e4c7"),
    (3.0, "black on #fff3b0"),
    (10.0, "black on #f9b572"),
    (30.0, "white on #d9534f"),
    (math.inf, "bold white on #7a0f2b"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One response token. Example: `Token(text="7", id=26, p_rollout=0.81, p_recomputed=0.80)`."""

    text: str
    id: int
    p_rollout: float
    p_recomputed: float | None  # None if the run recorded no recomputed log-probs

    @property
    def discrepancy(self) -> float:
        """|p_train - p_inf|; 0 if it is not known."""
        return 0.0 if self.p_recomputed is None else abs(self.p_recomputed - self.p_rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A line of a rollout file as a dict, and its response tokens."""

    line: dict[str, Any]
    tokens: tuple[Token, ...]

    @property
    def worst(self) -> float:
        """The largest discrepancy of its tokens."""
        return max((token.discrepancy for token in self.tokens), default=0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and show the samples; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with rollouts/ and config.yaml")
    parser.add_argument("--step", type=int, help="default: the last recorded one")
    parser.add_argument("--num", type=int, default=8, help="number of samples, default 8")
    parser.add_argument("--source", help="only prompts from this task or file")
    parser.add_argument(
        "--evaluation",
        nargs="?",
        const="",
        metavar="SET",
        help="samples of an evaluation: of this set, or without a name of the held-out prompts",
    )
    parser.add_argument("--worst", action="store_true", help="largest token discrepancy first")
    parser.add_argument("--no-color", action="store_true", help="numbers instead of colours")
    options = parser.parse_args(arguments)
    console = Console(no_color=options.no_color, highlight=False)
    return run_tool("inspect_rollouts", lambda: _show(options, console))


def _show(options: argparse.Namespace, console: Console) -> None:
    config = load_config(options.run_dir / "config.yaml")
    folder = samples_folder(options.run_dir, options.evaluation)
    step = last_step(folder) if options.step is None else options.step
    samples = read_samples(folder, step, decoder(config.model.path))
    total = len(samples)
    if options.source is not None:
        samples = [sample for sample in samples if sample.line["source"] == options.source]
    if options.worst:
        samples = sorted(samples, key=lambda sample: sample.worst, reverse=True)
    samples = samples[: options.num]
    constraint = config.objective.constraint
    if constraint.measure != "probability":
        constraint = ConstraintConfig()
    tolerance = tolerance_of(constraint, options.run_dir)
    should_color = console.is_terminal and not options.no_color
    console.print(f"step {step}: {len(samples)} of {total} samples")
    if not any(token.p_recomputed is not None for sample in samples for token in sample.tokens):
        console.print("no recomputed log-probs were recorded: no discrepancy to show")
    if should_color:
        console.print(legend(tolerance))
    for sample in samples:
        console.rule(style="dim")
        console.print(heading(sample))
        console.print(Text(sample.line["prompt"], style="dim"))
        console.print(colored(sample, tolerance) if should_color else numbers(sample))


def samples_folder(run_dir: Path, evaluation: str | None) -> Path:
    """The folder of the samples of training, or of an evaluation set.

    Args:
        run_dir: of a run, or of an evaluation without a run (`evaluations/0001`).
        evaluation: name of the set; "": the held-out prompts; None: training.
    """
    folder = run_dir / "rollouts"
    if evaluation is None:
        return folder
    of_run = folder / "eval"
    return (of_run if of_run.is_dir() else folder) / evaluation


def tolerance_of(constraint: ConstraintConfig, run_dir: Path) -> float:
    """The tolerance of the run; if it was measured, the last value in its metrics.

    Raises:
        DataError: the tolerance is measured, and no line of metrics has it.
    """
    setting, is_above = constraint.tolerance, constraint.tolerance_above
    if not isinstance(setting, str) and (is_above == "zero" or not constraint.enabled):
        return setting
    path, key = run_dir / "metrics.jsonl", "constraint/tolerance"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    measured = [line[key] for line in lines if key in line]
    if not measured:
        raise DataError(
            f"{path}: expected a line with {key}, got none: the run measures its tolerance "
            "(objective.constraint.tolerance=auto over the first tolerance_steps steps, "
            "tolerance_above=fresh_gap in every step)"
        )
    return measured[-1]


def last_step(folder: Path) -> int:
    """The highest step number among the files of a rollouts/ folder.

    Raises:
        DataError: the folder holds no recorded step.
    """
    names = [
        re.fullmatch(r"step_(\d+)\.rank\d+\.jsonl", each.name) for each in folder.glob("step_*")
    ]
    steps = [int(name[1]) for name in names if name]
    if not steps:
        raise DataError(f"{folder}: expected step_000000.rank0.jsonl or others, got none")
    return max(steps)


def decoder(model_path: str) -> Callable[[int], str]:
    """A function from token id to text, by the tokenizer of the run's model.

    Raises:
        DataError: there is no such folder.
    """
    # Imported here because it takes seconds, and a wrong folder should be reported before.
    from transformers import AutoTokenizer

    if not Path(model_path).is_dir():
        raise DataError(f"model.path of the run: expected a checkpoint folder, got {model_path!r}")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return lambda token_id: tokenizer.decode([token_id])


def read_samples(folder: Path, step: int, decode: Callable[[int], str]) -> list[Shown]:
    """The samples of all ranks of a step, sorted by prompt and sample index.

    Raises:
        DataError: the step was not recorded, or a file of it is damaged.
    """
    recomputed = read_recomputed(folder, step)
    samples = []
    for line in read_recorded(folder, step):
        logprobs = recomputed.get((line["prompt_index"], line["sample_index"]))
        tokens = tuple(
            Token(
                text=decode(token_id),
                id=token_id,
                p_rollout=math.exp(line["rollout_logprobs"][index]),
                p_recomputed=None if logprobs is None else math.exp(logprobs[index].item()),
            )
            for index, token_id in enumerate(line["token_ids"].tolist())
            if line["loss_mask"][index]
        )
        samples.append(Shown(line=line, tokens=tokens))
    return samples


def heading(sample: Shown) -> Text:
    """One line about a sample: prompt, reward, advantage, expected answer, end of the response,
    discrepancy.
    """
    line = sample.line
    reward_style = "bold green" if line["reward"] > 0 else "bold red"
    text = Text.assemble(
        (f"prompt {line['prompt_index']}.{line['sample_index']}", "bold"),
        f"  {line['source']}  reward ",
        (f"{line['reward']:g}", reward_style),
        f"  advantage {line['advantage']:+.3f}  {line['finish_reason']}",
        f"  expected {line['answer']!r}  response {_shortened(line['response'])!r}",
    )
    for name, reward in line.get("verifier_rewards", {}).items():
        text.append(f"  {name} {reward:g}")
    if line["failure"]:
        text.append(f"  verifier: {line['failure']}", "bold red")
    if not line["is_formatted"]:
        text.append("  no answer found in it", "red")
    if sample.tokens and sample.tokens[0].p_recomputed is not None:
        mean = sum(token.discrepancy for token in sample.tokens) / len(sample.tokens)
        text.append(f"  discrepancy mean {mean:.4f} max {sample.worst:.4f}", "cyan")
    return text


def _shortened(response: str) -> str:
    """The end of the response, where its answer is."""
    text = response.strip()
    return text if len(text) <= SHOWN else f"...{text[-SHOWN:]}"


def legend(tolerance: float) -> Text:
    """The colours and the discrepancies that they stand for."""
    text = Text("discrepancy ")
    for multiple, style in SHADES:
        bound = f"<= {multiple * tolerance:.4f}" if math.isfinite(multiple) else "above"
        text.append(f" {bound} ", style).append(" ")
    return text.append(f"(tolerance {tolerance:g})", "dim")


def colored(sample: Shown, tolerance: float) -> Text:
    """The response as text, each token with a background colour."""
    text = Text()
    for token in sample.tokens:
        # Infinity is compared without multiplying: times a tolerance of 0 it would be NaN.
        shade = next(
            style
            for multiple, style in SHADES
            if multiple == math.inf or token.discrepancy <= multiple * tolerance
        )
        style = "" if token.p_recomputed is None else shade
        text.append(token.text.replace("\n", "↵\n"), style)
    return text


def numbers(sample: Shown) -> Table:
    """The response as a table with one row per token."""
    table = Table(box=None, pad_edge=False)
    table.add_column("token")
    for title in ("id", "p rollout", "p recomputed", "discrepancy"):
        table.add_column(title, justify="right")
    for token in sample.tokens:
        has_both = token.p_recomputed is not None
        table.add_row(
            Text(repr(token.text)),
            str(token.id),
            f"{token.p_rollout:.5f}",
            f"{token.p_recomputed:.5f}" if has_both else "-",
            f"{token.discrepancy:.5f}" if has_both else "-",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
