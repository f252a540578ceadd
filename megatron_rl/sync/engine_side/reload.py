"""[vllm] Repairs state that stock vLLM 0.32 leaves wrong when a model is reloaded layer by layer.

The first function is needed on every device: it discards a reload that was not completed. The
others are needed for the CPU backend, which packs weights into oneDNN buffers that a reload does
not update. Each function names the vLLM file that makes it necessary. This module is imported only
inside an engine.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import layerwise


def discard_partial_reload(model: torch.nn.Module) -> None:
    """Restore the old tensors of every layer whose reload was begun but not finished, so that the
    next reload starts from a clean state.

    The reason is in model_executor/model_loader/reload/layerwise.py: `initialize_layerwise_reload`
    skips a layer that still waits for tensors, and keeps the tensors of the failed update queued
    and counted. The next update would then complete the layer too early, with tensors of both
    updates. Layers that the failed update completed keep its tensors; only a complete update
    replaces them.
    """
    for layer in model.modules():
        waiting = layerwise.get_layerwise_info(layer)
        if waiting.can_load():
            layerwise._place_kernel_tensors(layer, waiting)
            waiting.reset()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    layerwise.LOADING_LAYERS.clear()


def keep_int8_scales_alive(model: torch.nn.Module) -> None:
    """Keep a reference to the scale tensor whose address oneDNN holds. Must be called once, before
    the first reload.

    The reason is in model_executor/kernels/linear/scaled_mm/cpu.py: `process_weights_for_onednn`
    passes the layer's scale to `create_onednn_scaled_mm`, which keeps its address. A reload copies
    the values elsewhere and frees the tensor; the engine would then compute NaN.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    for layer in model.modules():
        kernel = getattr(getattr(layer, "scheme", None), "kernel", None)
        if isinstance(kernel, CPUInt8ScaledMMLinearKernel):
            _keep_scale_of(kernel)


def _keep_scale_of(kernel: object) -> None:
    process = kernel.process_weights_after_loading

    def process_and_keep(layer: torch.nn.Module) -> None:
        process(layer)
        scale_name = kernel.layer_param_names[1]
        kernel.kept_scale = getattr(layer, scale_name)

    kernel.process_weights_after_loading = process_and_keep


def repack_tied_head(model: torch.nn.Module) -> None:
    """Pack a tied lm_head again, from the embedding whose tensor it shares.

    The reason is in model_executor/layers/vocab_parallel_embedding.py: `UnquantizedEmbeddingMethod`
    packs the head only once. A reload loads no tensor for a tied head, so the packed copy would
    remain outdated.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, ParallelLMHead):
        return
    head.weight = model.model.embed_tokens.weight
    head.quant_method.process_weights_after_loading(head)


def repack_experts(model: torch.nn.Module) -> None:
    """Pack the experts' weights again.

    The reason is in model_executor/layers/fused_moe/unquantized_fused_moe_method.py:
    `_setup_kernel` packs only on the first load.
    """
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)
