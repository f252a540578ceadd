"""Compares the time of log-probs from hidden states with that of the matrix product alone.

    OMP_NUM_THREADS=2 python tools/bench_linear_logprobs.py --rows 256 --hidden 512 --vocab 32000
    python tools/bench_linear_logprobs.py --device cuda      # the shape of docs/gpu-results.md

Prints one table. "product" is `hidden @ weight.T` in one call, by cuBLAS on a GPU; "product in
chunks" does it in the chunks of rows that the operator uses, and nothing else. Times are medians of
warm runs, alternating between the functions.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from bench_logprobs import DTYPES, cache_filler, machine, peak, reset_peak, timed

from megatron_rl.ops.logprobs import linear_token_logprobs


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    place = {"dtype": DTYPES[options.dtype], "device": device}
    hidden = torch.randn(options.rows, options.hidden, **place)
    weight = torch.randn(options.vocab, options.hidden, **place) * options.hidden**-0.5
    labels = torch.randint(options.vocab, (options.rows,), device=device)
    if device.type == "cuda":
        cache_filler(device)
    functions = contenders(hidden, weight, labels, options.chunks)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    extra = dict.fromkeys(functions, 0.0)
    for run in range(options.runs + 1):  # the first run is the warm-up
        for name, function in functions.items():
            before = reset_peak(device)
            elapsed = timed(function, device)
            if run > 0:
                seconds[name].append(elapsed)
                extra[name] = max(extra[name], peak(device) - before)
            hidden.grad = weight.grad = None
    shape = f"[{options.rows}, {options.hidden}] x [{options.vocab}, {options.hidden}]"
    print(f"\n{shape} {options.dtype}, {machine(device)}")
    print(f"{'':36}{'time':>11}{'x product':>11}{'memory':>12}")
    product = statistics.median(seconds["product"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:36}{median * 1e3:8.2f} ms{median / product:11.2f}{extra[name]:8.0f} MiB")


def contenders(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunks: list[int]
) -> dict[str, Callable[[], object]]:
    """Name -> function to time, for hidden [N, H], weight [V, H] and labels [N] int64."""
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def product(chunk_size: int) -> None:
        with torch.no_grad():
            for start in range(0, hidden.shape[0], chunk_size):
                hidden[start : start + chunk_size] @ weight.T

    def forward(chunk_size: int) -> None:
        with torch.no_grad():
            linear_token_logprobs(*leaves, labels, chunk_size=chunk_size)

    def both(chunk_size: int) -> None:
        linear_token_logprobs(*leaves, labels, chunk_size=chunk_size).sum().backward()

    functions: dict[str, Callable[[], object]] = {"product": lambda: product(hidden.shape[0])}
    for size in chunks:
        functions[f"product in chunks of {size}"] = lambda size=size: product(size)
        functions[f"megatron_rl, chunks of {size}"] = lambda size=size: forward(size)
        functions[f"  and backward, chunks of {size}"] = lambda size=size: both(size)
    return functions


if __name__ == "__main__":
    main()
