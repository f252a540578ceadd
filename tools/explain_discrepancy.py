"""Finds the causes of the discrepancy between learner and engine, by disabling one after another.

    python tools/explain_discrepancy.py configs/quickstart.yaml -o runs/explain \\
        rollout.quantization.format=int4 rollout.kv_cache_dtype=fp8

Starts real runs with the same checkpoint, prompts and sampling seeds, each with one cause less,
from the given settings down to float32 on both sides. The gap of a run is the mean of
|p_train - p_inf| over its sampled tokens. The share of a cause is the difference between two
consecutive runs, so the shares add up to the total. The first run reads the engine's raw log-probs
if these differ from what the engine samples from; a training run never reads them.

Every run trains `sync.every` steps, and its gap is measured in the last one. Writes explain.json
and explain.png next to the runs; finished runs are not repeated. Finally prints the effect of the
arithmetic of log-probs alone, from the same logits (tools/arithmetic_gap.py).

    python tools/explain_discrepancy.py configs/quickstart.yaml -o runs/formats \\
        --checkpoint /models/fp8 --checkpoint /models/int4

compares engines that serve other checkpoints of the learner's model instead, such as those of
tools/quantize_checkpoint.py, after one with its own (tools/checkpoint_gap.py). Without sync they
show what the format alone changes. One that the engine does not load is told with its reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed
import torch
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from megatron_rl.config import Config
from megatron_rl.config.file import load_config
from megatron_rl.errors import ConfigError, EngineError
from megatron_rl.loop.preflight import truncation_of
from megatron_rl.objective.discrepancy import discrepancy
from megatron_rl.process.lifetime import watch_signals
from megatron_rl.process.tool import run_tool
from megatron_rl.rollout.recording import read_recomputed, read_step
from megatron_rl.study.runs import run_to_the_end

BLUE, GREY = "#2563a8", "#5f6b7a"
RAW_LOGPROBS = ("--logprobs-mode", "raw_logprobs")
NO_PREFIX_CACHE = ("--no-enable-prefix-caching",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One possible cause of a gap, and how to disable it.

    Example: `Cause(name="prefix cache", is_there=True, engine_without=NO_PREFIX_CACHE)`.
    """

    name: str
    is_there: bool  # with the given settings
    off: tuple[str, ...] = ()  # settings that disable it
    engine_with: tuple[str, ...] = ()  # arguments of the engine while the cause is present
    engine_without: tuple[str, ...] = ()  # arguments of the engine that disable it


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The gap over the tokens that one run sampled.

    Example: `Gap(name="all causes", num_tokens=3072, mean=0.0021, standard_error=0.0001,
    largest=0.08, largest_logprob=0.3)`.
    """

    name: str
    num_tokens: int
    mean: float  # of |p_train - p_inf|
    standard_error: float  # of the mean, over sequences
    largest: float
    largest_logprob: float  # max |d logprob| / max(1, |logprob|)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, report; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="YAML file of a run, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/explain"))
    parser.add_argument(
        "--checkpoint", type=Path, action="append", default=[], metavar="FOLDER", help="see above"
    )
    options = parser.parse_intermixed_args(arguments)
    watch_signals(lambda: "finished runs are kept")
    return run_tool("explain_discrepancy", lambda: _explain(options))


def _explain(options: argparse.Namespace) -> None:
    if options.checkpoint:
        gaps = of_checkpoints(options.config, options.overrides, options.output, options.checkpoint)
        report(gaps, options.output, are_steps=False)
        return
    gaps = explain(options.config, options.overrides, options.output)
    report(gaps, options.output)
    compare_arithmetic(options.config, options.overrides, options.output / f"run_{len(gaps) - 1}")


def causes_of(config: Config) -> list[Cause]:
    """All causes, in the order in which they are disabled: requests first, precision last."""
    rollout, sampling = config.rollout, config.rollout.sampling
    samples = max(config.loop.samples_per_prompt, config.eval.num_samples)  # one prompt at a time
    is_truncated = truncation_of(rollout, "cpu").is_active
    return [
        Cause(
            name="raw log-probs of the engine",  # before temperature, top-k, top-p and min-p
            is_there=sampling.temperature != 1 or is_truncated,
            engine_with=RAW_LOGPROBS,
        ),
        Cause(name="stale weights", is_there=config.sync.every > 1, off=("sync.every=1",)),
        Cause(name="prefix cache", is_there=True, engine_without=NO_PREFIX_CACHE),
        Cause(
            name="batch size and scheduling",
            is_there=rollout.max_num_seqs > samples,
            off=(f"rollout.max_num_seqs={samples}", "rollout.max_in_flight=1"),
        ),
        Cause(
            name=f"KV cache in {rollout.kv_cache_dtype}",
            is_there=rollout.kv_cache_dtype != "auto",
            off=("rollout.kv_cache_dtype=auto",),
        ),
        Cause(
            name=f"weights in {rollout.quantization.format}",
            is_there=rollout.quantization.format != "none",
            off=("rollout.quantization.format=none",),
        ),
        Cause(
            name=f"engine in {rollout.dtype}",
            is_there=rollout.dtype != "float32",
            off=("rollout.dtype=float32",),
        ),
        Cause(
            name=f"learner in {config.model.dtype}",
            is_there=config.model.dtype != "float32",
            off=("model.dtype=float32",),
        ),
    ]


def explain(config_path: str, overrides: Sequence[str], output: Path) -> list[Gap]:
    """The gap with the given settings, then with one cause less each time.

    Raises:
        ConfigError: the settings cannot be loaded, or `output` holds finished runs with other ones.
        EngineError: a run failed.
    """
    config = load_config(config_path, overrides)
    causes = [cause for cause in causes_of(config) if cause.is_there]
    steps = max(config.sync.every, 1)
    common = [
        *overrides,
        *(f"loop.num_steps={steps}", "learner.recompute=always", "sync.probe_tolerance=1"),
        *("eval.every=0", "eval.at_start=false", "eval.at_end=false"),
        *("checkpoint.every=0", "checkpoint.save_hf=false", "replay="),
    ]
    gaps = []
    for number in range(len(causes) + 1):
        gone, left = causes[:number], causes[number:]
        name = f"without {gone[-1].name}" if gone else "all causes"
        engine = [*config.rollout.extra_args]
        engine += [word for cause in left for word in cause.engine_with]
        engine += [word for cause in gone for word in cause.engine_without]
        settings = [*common, *(each for cause in gone for each in cause.off)]
        settings.append(f"rollout.extra_args=[{','.join(engine)}]")
        print(f"{number + 1} of {len(causes) + 1}: {name}", file=sys.stderr, flush=True)
        run_dir = run_to_the_end(config_path, settings, output / f"run_{number}")
        gaps.append(measure(run_dir / "rollouts", steps, name))
    return gaps


def measure(folder: Path, step: int, name: str) -> Gap:
    """The gap over every token that a recorded step sampled."""
    groups = [each.group for each in read_step(folder, step)]
    recomputed = read_recomputed(folder, step)
    of_sequences, relative = [], []
    for group in groups:
        for index, rollout in enumerate(group.rollouts):
            is_sampled = torch.from_numpy(rollout.loss_mask)
            served = torch.from_numpy(rollout.rollout_logprobs)[is_sampled]
            learned = recomputed[group.prompt.index, index].double()[is_sampled]
            of_sequences.append(discrepancy(learned, served).double())
            relative.append((learned - served).abs() / learned.abs().clamp(min=1.0))
    gaps = torch.cat(of_sequences)
    # The tokens of one sequence are not independent, so this is the standard error of a ratio of
    # sums over sequences.
    residuals = torch.stack([(each - gaps.mean()).sum() for each in of_sequences])
    return Gap(
        name=name,
        num_tokens=gaps.numel(),
        mean=float(gaps.mean()),
        standard_error=float(residuals.square().sum().sqrt() / gaps.numel()),
        largest=float(gaps.max()),
        largest_logprob=float(torch.cat(relative).max()),
    )


def of_checkpoints(
    config_path: str, overrides: Sequence[str], output: Path, checkpoints: Sequence[Path]
) -> list[Gap]:
    """The gap of an engine with the learner's checkpoint, and of one with each of the others that
    the engine loads.

    Raises:
        ConfigError: the settings cannot be loaded, or two checkpoints have one name.
        EngineError: the learner's own checkpoint could not be measured.
    """
    own = Path(load_config(config_path, overrides).model.path)
    names = [path.resolve().name for path in checkpoints]
    if len(set(names)) < len(names):
        raise ConfigError(f"--checkpoint: expected folders of different names, got {names}")
    tool = Path(__file__).with_name("checkpoint_gap.py")
    gaps = []
    for name, path in zip(["the learner's", *names], [own, *checkpoints], strict=True):
        print(f"{name}: {path}", file=sys.stderr, flush=True)
        run_dir = output / ("checkpoint" if path is own else f"checkpoint_{name}")
        command = [sys.executable, str(tool), config_path, "--checkpoint", str(path)]
        found = subprocess.run(
            [*command, *overrides, f"run_dir={run_dir}"], capture_output=True, text=True
        )
        if found.returncode == 0:
            gaps.append(measure(run_dir / "rollouts", 1, name))
            continue
        reason = (found.stderr.strip() or "no word").splitlines()[0]
        if path is own:
            raise EngineError(f"{tool.name}: expected a gap of {path}, got {reason}")
        print(f"{name}: not measured: {reason}")
    return gaps


def compare_arithmetic(config_path: str, overrides: Sequence[str], run_dir: Path) -> None:
    """Print how other ways to compute log-probs differ, from the logits of a run's first step."""
    tool = Path(__file__).with_name("arithmetic_gap.py")
    command = [sys.executable, str(tool), config_path, *overrides]
    command += [f"replay={run_dir / 'rollouts'}", f"run_dir={run_dir / 'arithmetic'}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode != 0:
        raise EngineError(f"{tool.name}: expected figures, got {found.stderr.strip()}")
    for line in found.stdout.splitlines():
        if line.startswith("{"):
            figures = json.loads(line)
            print(
                f"{figures['way']} instead of the aligned log-prob, from the same logits: mean "
                f"{figures['mean']:.2g}, largest {figures['largest']:.2g}"
            )


def report(gaps: Sequence[Gap], output: Path, *, are_steps: bool = True) -> None:
    """Print a table, and write explain.json and explain.png to `output`.

    Args:
        are_steps: whether each gap has one cause less than the one before it, whose share is then
            told.
    """
    table = Table(title="mean |p_train - p_inf|", title_justify="left")
    table.add_column("")
    for heading in ("gap", "+-", "share", "largest", "largest d logprob", "tokens"):
        table.add_column(heading, justify="right")
    for before, gap in zip([None, *gaps], gaps):
        table.add_row(
            gap.name,
            f"{gap.mean:.3g}",
            f"{gap.standard_error:.1g}",
            f"{before.mean - gap.mean:.3g}" if before and are_steps else "",
            f"{gap.largest:.3g}",
            f"{gap.largest_logprob:.2g}",
            f"{gap.num_tokens:,}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    (output / "explain.json").write_text(json.dumps([asdict(gap) for gap in gaps], indent=2))
    draw(gaps, output / "explain.png")
    print(output / "explain.png")


def draw(gaps: Sequence[Gap], path: Path) -> None:
    """Draw a bar per run on a logarithmic axis, with two standard errors."""
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(gaps) + 1.2))
    positions = range(len(gaps))
    means = [max(gap.mean, 1e-9) for gap in gaps]
    errors = [2 * gap.standard_error for gap in gaps]
    axes.barh(positions, means, xerr=errors, color=BLUE, ecolor=GREY, height=0.6)
    axes.set_yticks(positions, [gap.name for gap in gaps])
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Over few decades matplotlib would label every minor tick, each over its neighbour.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("mean |p_train - p_inf| over sampled tokens, two standard errors")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
