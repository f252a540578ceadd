"""Checksums of the log-probs, entropies and gradients of made rows: what every machine and device
must reproduce. `bit_vectors.json` holds them as the CPU kernels made them.

    python -m tests.ops.vectors                 compares this machine's CPU
    python -m tests.ops.vectors --device cuda   compares its GPU
    python -m tests.ops.vectors --write         stores them anew, from the CPU

The rows come from integers alone, so that no generator of random numbers needs to stay as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rl.ops import kernels
from megatron_rl.ops.logprobs import token_logprobs_and_entropy

STORED = Path(__file__).with_name("bit_vectors.json")
VOCAB_SIZE = 151936
NUM_ROWS = (1, 8, 64)  # the first of the same 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEMPERATURES = (1.0, 0.7, 1.3)


def made_rows(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [N, V] float32, labels [N] and incoming gradients [N]: hashes scaled by powers of two.

    Row by row flat and wide, peaked, and with a seventh of the columns at -inf.
    """
    index = torch.arange(num_rows * vocab_size, dtype=torch.int64)
    mixed = (index + 1) * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    mixed = (mixed ^ (mixed >> 13)).view(num_rows, vocab_size)
    logits = (mixed - 2**31).double() / 2**28  # -8 to 8
    row = torch.arange(num_rows)
    labels = row * 7919 % vocab_size
    logits[row % 3 == 1] *= 4.0
    logits[row, labels] += torch.where(row % 2 == 0, 16.0, 0.0).double()
    is_cut = (row % 5 == 2)[:, None] & (mixed % 7 == 0)
    is_cut[row, labels] = False
    incoming = (mixed[:, 0] - 2**31).double() / 2**30
    return logits.masked_fill(is_cut, -torch.inf).float(), labels, incoming.float()


def checksums(device: torch.device) -> Iterator[tuple[str, str]]:
    """(dtype, temperature, rows and quantity, checksum of its bits), one by one."""
    logits, labels, incoming = made_rows(max(NUM_ROWS), VOCAB_SIZE)
    for name, dtype in DTYPES.items():
        for temperature in TEMPERATURES:
            for num_rows in NUM_ROWS:
                leaf = logits[:num_rows].to(dtype).to(device).requires_grad_()
                logprobs, entropy = token_logprobs_and_entropy(
                    leaf, labels[:num_rows].to(device), temperature=temperature
                )
                logprobs.backward(incoming[:num_rows].to(device))
                parts = {"logprobs": logprobs, "entropy": entropy, "gradient": leaf.grad}
                for part, tensor in parts.items():
                    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                    digest = hashlib.sha256(content).hexdigest()[:16]
                    yield f"{name} T={temperature} N={num_rows} {part}", digest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        STORED.write_text(json.dumps(dict(checksums(torch.device("cpu"))), indent=1) + "\n")
        return
    device = torch.device(options.device)
    stored = json.loads(STORED.read_text())
    found = dict(checksums(device))
    differing = [key for key in stored if found.get(key) != stored[key]]
    print(
        f"bits by {kernels.backend(device)}: {len(stored) - len(differing)} of {len(stored)} "
        f"checksums as stored, V={VOCAB_SIZE}, N={', '.join(map(str, NUM_ROWS))}"
    )
    for key in differing:
        print(f"  differs: {key}")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
