"""[door: vllm] What stock vLLM 0.32 leaves wrong when a model is loaded again layer by layer.

The first function is for every device: it takes back a reload that stopped half way. The rest mends
the CPU backend, which packs weights into buffers of oneDNN that a reload does not see. Each names
the vLLM file it answers. Loaded only inside an engine.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import layerwise


def discard_partial_reload(model: torch.nn.Module) -> None:
    """Put the old tensors back where a reload was begun and not finished, so that a new one starts
    from nothing.

    Answers model_executor/model_loader/reload/layerwise.py: `initialize_layerwise_reload` skips a
    layer that is already waiting, with the tensors of the broken update still queued and counted;
    the next update would then complete the layer early, with old and new tensors mixed. What a
    finished layer of the broken update loaded stays: only a complete update makes the model whole.
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
    """Hold on to the scale tensor whose address oneDNN keeps. To be called once, before the first
    reload.

    Answers model_executor/kernels/linear/scaled_mm/cpu.py: `process_weights_for_onednn` gives the
    layer's scale to `create_onednn_scaled_mm`, which keeps its address; a reload then copies the
    values elsewhere and frees it (NaN).
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
    """Pack a tied lm_head again from the embedding it shares.

    Answers model_executor/layers/vocab_parallel_embedding.py: `UnquantizedEmbeddingMethod` packs
    the head once; a reload gives the head no tensor of its own, so the packed copy stays as it was.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, ParallelLMHead):
        return
    head.weight = model.model.embed_tokens.weight
    head.quant_method.process_weights_after_loading(head)


def repack_experts(model: torch.nn.Module) -> None:
    """Pack the experts' weights again.

    Answers model_executor/layers/fused_moe/unquantized_fused_moe_method.py: `_setup_kernel` packs
    only on the first load.
    """
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)
