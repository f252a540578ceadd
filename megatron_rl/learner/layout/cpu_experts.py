"""[imports megatron] Runs Megatron-Core's experts on a machine without CUDA, as cpu_device.py does
for the rest: every adaptation, with the place in Megatron-Core that needs it.

`run_experts_on_cpu()` is called before a layer with experts is built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.learner.layout.cpu_device import CPU_STREAM, Spot

SPOTS = (
    Spot(
        file="transformer/moe/token_dispatcher.py",
        pattern=r"torch\.cuda\.Stream\(\)",
        answer="_copies_need_no_stream",
    ),
    Spot(
        file="transformer/moe/moe_utils.py",
        pattern=r"if torch\.is_tensor\(tensor\) and tensor\.is_cuda:",
        answer="_split_sizes_are_lists",
    ),
    Spot(
        file="transformer/moe/moe_utils.py",
        pattern=r"if te_general_gemm is not None",
        answer="_no_product_of_transformer_engine",
    ),
    Spot(
        file="tensor_parallel/mappings.py",
        pattern=r"output_tensor_list = list\(\n? *torch\.split\(output, output_split_sizes",
        answer="_unequal_shares_over_gloo",
    ),
)


def run_experts_on_cpu() -> None:
    """Adapt Megatron's experts to the CPU and to gloo. Idempotent."""
    from megatron.core.transformer.moe import token_dispatcher

    if token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream is CPU_STREAM:
        return
    _copies_need_no_stream()
    _split_sizes_are_lists()
    _no_product_of_transformer_engine()
    _unequal_shares_over_gloo()


def _copies_need_no_stream() -> None:
    """Copies of split sizes to the host have a stream of their own; there is nothing to copy."""
    from megatron.core.transformer.moe import token_dispatcher

    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = CPU_STREAM


class _Splits(list):
    """Split sizes as `all_to_all_single` takes them, with the method of an array."""

    def tolist(self) -> list[int]:
        return list(self)


def _split_sizes_are_lists() -> None:
    """On a GPU, tensors of split sizes become arrays when they are copied to the host. Those of a
    CPU are not copied, and torch's `all_to_all_single` does not take tensors.
    """
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return _Splits(tensor.tolist())
        return original(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move


def _no_product_of_transformer_engine() -> None:
    """Release 0.16 leaves the name undefined without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _unequal_shares_over_gloo() -> None:
    """With expert tensor parallelism, the ranks of a group have different numbers of tokens. gloo
    gathers and scatters equal shares only.
    """
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_unequal(
        input_: torch.Tensor,
        group: dist.ProcessGroup | None = None,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = gather(padded, group).split(longest) if longest else [input_] * group.size()
        return torch.cat(
            [part[:size] for part, size in zip(parts, output_split_sizes, strict=True)]
        )

    def scatter_unequal(
        input_: torch.Tensor,
        group: dist.ProcessGroup | None = None,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        dist.all_reduce(whole, group=group)
        return whole.split(input_split_sizes)[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather_unequal
    mappings._reduce_scatter_along_first_dim = scatter_unequal
