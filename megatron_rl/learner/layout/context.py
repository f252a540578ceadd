"""[imports megatron] Context parallelism. No other module depends on it.

It is not used yet: every rank holds whole sequences. Only the group of ranks over which the sums of
a global batch are added already takes it into account.
"""

from __future__ import annotations

import torch.distributed as dist


def global_batch_group() -> dist.ProcessGroup:
    """The process group over which the sums of a global batch are reduced: data parallelism and
    context parallelism together. `initialize_parallel` must have created Megatron's groups before.
    """
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
