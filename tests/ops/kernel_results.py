"""What the C++ kernels give, whichever build of them is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from tests.ops.rows import DTYPES, TEMPERATURES, Native, make_problem, run_shards


def results() -> Iterator[tuple[torch.Tensor, ...]]:
    """Log-probs, entropy, root (of which log-sum-exp is made), maximum and gradient, of every
    instruction set, through whole rows and through shards cut anywhere.
    """
    torch.manual_seed(0)
    cut = [0, 1, 129, 2050, 4096, 6201]
    for dtype, temperature, name in itertools.product(
        DTYPES, TEMPERATURES, torch.ops.megatron_rl.instruction_sets()
    ):
        problem = make_problem(6, 6201, dtype)
        for edges in ([0, 6201], cut):
            layout = {"temperature": temperature, "edges": edges, "vocab_size": 6200}
            yield run_shards(Native(name), *problem, **layout)
            yield run_shards(Native(name), *problem, **layout, has_entropy=False)
        if name != "portable" and temperature == 1.0:
            layout = {"temperature": 1.0, "edges": [0, 151936], "vocab_size": 151936}
            yield run_shards(Native(name), *make_problem(6, 151936, dtype), **layout)
