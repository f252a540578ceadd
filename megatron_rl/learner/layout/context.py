"""[imports megatron] Context parallelism, of which no other module knows.

It is not used yet: every rank holds its sequences whole. One thing depends on it already: the ranks
over which the sums of a global batch are added.
"""

from __future__ import annotations

import torch.distributed as dist


def global_batch_group() -> dist.ProcessGroup:
    """The ranks over which the sums of a global batch are added: those of data and of context
    parallelism together. `initialize_parallel` must have made Megatron's groups.
    """
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
