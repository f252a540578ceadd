"""Compares the time of the aligned log-prob of given logits with other implementations.

    OMP_NUM_THREADS=2 python tools/bench_logprobs.py --rows 1024 --vocab 151936
    OMP_NUM_THREADS=2 python tools/bench_logprobs.py --rows 1 8 64 1024 4096 \\
        --vocab 32000 151936 262144 --memory-gib 10 -o docs/logprobs-benchmark.md
    python tools/bench_logprobs.py --device cuda --rows 64 4096

Prints a Markdown table for every shape, of the forward pass, and of the forward and backward pass
to the logits. Times are medians of warm runs, alternating between the functions, so that a load on
the machine affects all of them. "times" is the speed relative to the first row. "read" is a plain
sum over the memory of the logits, and "share" is the time of that read divided by the time of the
forward pass. "memory" is the peak of forward and backward pass, without the logits and without
memory that is kept between runs (on the CPU, one gradient of megatron_rl of at most 512 MiB). On a
GPU the cache is flushed before every run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import distributed

from megatron_rl.ops import kernels
from megatron_rl.ops.logprobs import token_logprobs, token_logprobs_and_entropy

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MOST_COPIES = 16  # upper bound on the memory of any function, in copies of the logits
FIRST = "torch: log_softmax, gather"  # the baseline
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The measurements of one function. Example: `Timing(forward=0.019, both=0.046,
    extra_mebibytes=0.0, error=3.3e-8)`.
    """

    forward: float  # seconds
    both: float  # seconds of forward and backward pass
    extra_mebibytes: float  # peak memory of forward and backward pass beyond the logits
    error: float  # max |difference to float64| / max(1, |logprob|) over the first rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure every shape, and print or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[151936])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out implementations that compile"
    )
    parser.add_argument(
        "--memory-gib", type=float, help="leave out implementations that need more in total"
    )
    parser.add_argument("-o", "--output", type=Path, help="Markdown file to write the tables to")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    command = " ".join(
        ["tools/bench_logprobs.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    heading = (
        f"# Log-probs of logits\n\n`{command}`: {machine(device)}; medians of {options.runs} runs "
        "that alternate. times: speed relative to the first row; share: time of a plain read of "
        "the logits divided by that of the forward pass; memory: peak beyond the logits, without "
        "the one gradient of at most 512 MiB that megatron_rl keeps on a CPU."
    )
    sections = [heading]
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{Path(folder) / 'meet'}",
            rank=0,
            world_size=1,
        )
        for vocab_size in options.vocab:
            for num_rows in options.rows:
                functions = contenders(compiled=not options.no_compile, device=device)
                shape, dtype = (num_rows, vocab_size), DTYPES[options.dtype]
                sections.append(
                    bench(functions, shape, dtype, device, options.runs, options.memory_gib)
                )
                print(f"\n{sections[-1]}", flush=True)
                if options.output is not None:  # after each shape, in case of an interruption
                    options.output.write_text("\n\n".join(sections) + "\n")
        distributed.destroy_process_group()


def log_softmax_and_gather(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N] float32 log-probs of labels [N] from logits [N, V]; the baseline."""
    log_softmax = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    return log_softmax.gather(1, labels[:, None])[:, 0]


def gather_minus_logsumexp(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N] float32 log-probs, without the log-softmax of the other columns."""
    return logits.gather(1, labels[:, None])[:, 0].float() - logits.float().logsumexp(1)


def contenders(*, compiled: bool, device: torch.device) -> dict[str, Function]:
    """Name -> function from logits [N, V] and labels [N] to log-probs [N]."""
    functions: dict[str, Function] = {
        FIRST: log_softmax_and_gather,
        "torch: gather - logsumexp": gather_minus_logsumexp,
    }
    if compiled:
        torch.compiler.reset()  # after 8 shapes of a function torch.compile falls back to eager
        functions["torch.compile of the first"] = torch.compile(
            log_softmax_and_gather, dynamic=False
        )
        functions |= megatron()
        if device.type == "cuda":
            functions |= liger()
    functions["megatron_rl"] = token_logprobs
    functions["megatron_rl, with entropy"] = lambda logits, labels: token_logprobs_and_entropy(
        logits, labels
    )[0]
    functions["megatron_rl, over the logits"] = lambda logits, labels: token_logprobs(
        logits, labels, overwrite_logits=True
    )
    return functions


def megatron() -> dict[str, Function]:
    """Megatron's fused cross entropy, if Megatron is installed."""
    try:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    except ImportError as error:
        print(f"Megatron's cross entropy left out: {error}")
        return {}

    def logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        group = distributed.group.WORLD
        return -fused_vocab_parallel_cross_entropy(logits[:, None], labels[:, None], group)[:, 0]

    return {"Megatron: fused cross entropy": logprobs}


def liger() -> dict[str, Function]:
    """Liger's cross entropy, if Liger is installed."""
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError as error:
        print(f"Liger's cross entropy left out: {error}")
        return {}

    def logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -liger_cross_entropy(logits, labels, reduction="none")

    return {"Liger: cross entropy": logprobs}


def bench(
    functions: dict[str, Function],
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    num_runs: int,
    memory_gib: float | None,
) -> str:
    """Measure all functions on one shape [N, V] and return the table."""
    torch.manual_seed(0)
    original = torch.randn(shape, dtype=dtype, device=device)
    labels = torch.randint(shape[1], shape[:1], device=device)
    logits = torch.empty_like(original)
    num_bytes = original.numel() * original.element_size()
    words = logits.view(torch.uint8).view(-1)[: num_bytes // 8 * 8].view(torch.int64)
    logits.copy_(original)
    left_out = {}
    most = peak(device) / 1024 + MOST_COPIES * num_bytes / 2**30
    if memory_gib is not None and most > memory_gib:
        needed = {name: needed_gib(one, logits, labels) for name, one in functions.items()}
        left_out = {name: gib for name, gib in needed.items() if gib > memory_gib}
    functions = {name: one for name, one in functions.items() if name not in left_out}
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in functions}
    extra = dict.fromkeys(functions, 0.0)
    reads = []
    for run in range(num_runs + 1):  # the first run is the warm-up
        for name, function in functions.items():
            logits.copy_(original)  # the backward pass of some functions overwrites them
            reads.append(timed(lambda: words.sum(), device))
            with torch.no_grad():
                forward = timed(lambda function=function: function(logits, labels), device)
            logits.copy_(original)
            leaf = logits.detach().requires_grad_()
            before = reset_peak(device)
            both = timed(
                lambda function=function, leaf=leaf: function(leaf, labels).sum().backward(), device
            )
            if run > 0:
                seconds[name][0].append(forward)
                seconds[name][1].append(both)
                extra[name] = max(extra[name], peak(device) - before)
    timings = {
        name: Timing(
            forward=statistics.median(forward),
            both=statistics.median(both),
            extra_mebibytes=extra[name],
            error=error_of(functions[name], original[:16].clone(), labels[:16]),
        )
        for name, (forward, both) in seconds.items()
    }
    return table(timings, left_out, original, statistics.median(reads))


def needed_gib(function: Function, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Estimate the process's memory in GiB from a run on a sixteenth of the rows."""
    num_rows = max(1, len(logits) // 16)
    for _ in range(2):  # the first run compiles
        leaf = logits[:num_rows].clone().requires_grad_()
        before = reset_peak(logits.device)
        function(leaf, labels[:num_rows]).sum().backward()
        needed = peak(logits.device) - before
    return (before + len(logits) / num_rows * needed) / 1024


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including the work on a GPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    cache_filler(device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def cache_filler(device: torch.device) -> torch.Tensor:
    """256 MiB, more than the cache of any GPU. It is kept, so that no measured peak includes it."""
    return torch.empty(2**28, dtype=torch.uint8, device=device)


def reset_peak(device: torch.device) -> float:
    """Reset the peak memory, and return the memory in use in MiB."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return peak(device)


def peak(device: torch.device) -> float:
    """Peak memory in MiB since the last reset: resident on the CPU, of tensors on a GPU."""
    if device.type == "cpu":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def error_of(function: Function, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Largest error compared with float64, relative to max(1, |logprob|)."""
    with torch.no_grad():
        got = function(logits.clone(), labels).double()
    expected = torch.log_softmax(logits.double(), dim=1).gather(1, labels[:, None])[:, 0]
    return float(((got - expected).abs() / expected.abs().clamp(min=1.0)).max())


def machine(device: torch.device) -> str:
    """A description of the machine: threads or GPU, torch, and the backend of megatron_rl."""
    what = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    return f"{what}, torch {torch.__version__}, megatron_rl by {kernels.backend(device)}"


def table(
    timings: dict[str, Timing], left_out: dict[str, float], logits: torch.Tensor, read: float
) -> str:
    """The Markdown table of one shape.

    Args:
        timings: by name. left_out: the GiB that each function needs which was not measured.
        logits: [N, V], for shape and dtype. read: seconds of a plain read of the logits.
    """
    num_bytes = logits.numel() * logits.element_size()
    first = next(iter(timings.values())) if FIRST in timings else None
    lines = [
        f"{list(logits.shape)} {str(logits.dtype).removeprefix('torch.')}, read "
        f"{read * 1e3:.2f} ms, {num_bytes / read / 1e9:.1f} GB/s:",
        "",
        f"| {'':32} | {'forward':>11} | times | GB/s | share | {'+backward':>11} | times | "
        f"{'memory':>9} | {'error':>7} |",
        f"|{'-' * 34}|{'-' * 12}:|{'-' * 6}:|{'-' * 5}:|{'-' * 6}:|{'-' * 12}:|{'-' * 6}:|"
        f"{'-' * 10}:|{'-' * 8}:|",
    ]
    for name, timing in timings.items():
        forward = f"{first.forward / timing.forward:.1f}" if first else "-"
        both = f"{first.both / timing.both:.1f}" if first else "-"
        lines.append(
            f"| {name:32} | {timing.forward * 1e3:8.2f} ms | {forward:>5} | "
            f"{num_bytes / timing.forward / 1e9:4.1f} | {read / timing.forward:5.0%} | "
            f"{timing.both * 1e3:8.2f} ms | {both:>5} | {timing.extra_mebibytes:5.0f} MiB | "
            f"{timing.error:.1e} |"
        )
    for name, gib in left_out.items():
        lines.append(f"| {name:32} | left out: {gib:.1f} GiB |  |  |  |  |  |  |  |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
