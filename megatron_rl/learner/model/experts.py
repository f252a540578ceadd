"""[imports megatron] Mixtures of experts: Megatron's settings for them, and a router that is told
about the row that it works on (routing.py).

A router chooses the experts of every token by the largest logits and weights them by the softmax
of all logits, or of the chosen ones (Shazeer et al. 2017, arXiv 1701.06538). Logits and weights are
float32. No token is dropped: an expert takes as many as it is sent.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.config.model import ParallelConfig
from megatron_rl.learner.layout.cpu_device import is_cpu_run
from megatron_rl.learner.layout.cpu_experts import run_experts_on_cpu
from megatron_rl.learner.model.routing import RowRouting, balance_losses, statistics_of
from megatron_rl.weights.geometry import ExpertGeometry, Geometry

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.moe.router_replay import RouterReplay

PRE_MLP_NORM = "pre_mlp_layernorm."


def expert_settings(
    experts: ExpertGeometry | None,
    layout: ParallelConfig,
    *,
    is_grouped: bool,
    has_replay: bool = False,
) -> dict[str, Any]:
    """Megatron's settings for the experts; none for a dense model.

    Args:
        is_grouped: whether a rank's experts are one grouped product, which needs Transformer
            Engine.
        has_replay: whether rows may bring their routes, or have them recorded.
    """
    if experts is None:
        return {}
    has_shared = experts.shared_ffn_hidden_size > 0
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.num_chosen,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": has_shared,
        "moe_router_pre_softmax": not experts.is_normalised,
        "moe_router_dtype": "fp32",
        # The router of this module adds the losses that balance the experts.
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": is_grouped,
        "moe_enable_routing_replay": has_replay,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }


def use_row_routing(layer: Any, geometry: Geometry) -> None:
    """Put this module's MoE layer and router into a layer spec.

    Args:
        layer: the submodules of Megatron's spec of a transformer layer.
    """
    if geometry.experts is None:
        return
    if is_cpu_run():
        run_experts_on_cpu()
    # The spec of the layer in release 0.16, in 0.19 a function with the same submodules.
    spec = layer.mlp
    submodules = spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
    submodules.router = row_router()
    # The keys of a checkpoint are those of Transformer Engine's layers, in which the norm before
    # the experts is a module of its own.
    names = layer.sharded_state_dict_keys_map
    layer.sharded_state_dict_keys_map = {
        name: key for name, key in names.items() if name != PRE_MLP_NORM
    }


def hand_rows_to_experts(model: GPTModel) -> None:
    """Make every MoE layer of the model work on the row in `packed_seq_params.routing`."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    def hand_over(layer: torch.nn.Module, _: Any, settings: dict[str, Any]) -> None:
        layer.mlp.row = settings["packed_seq_params"].routing

    # Megatron's list of all replays would keep this model alive; rows bring their routes instead.
    RouterReplay.clear_global_router_replay_instances()
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(hand_over, with_kwargs=True)
        _tell_router(layer.mlp)
        count_sent_tokens(layer.mlp.token_dispatcher)
        _mark_as_expert(layer.mlp.experts)


def _mark_as_expert(experts: torch.nn.Module) -> None:
    """Let gradients and optimizer state be exchanged among the ranks that hold the same shards of
    the same experts. Release 0.16 of Megatron marks the parameters itself only under expert
    parallelism (tensor_parallel/layers.py); otherwise it would use the data-parallel ranks, which
    hold others if expert tensor and tensor parallelism differ, without an error. With the mark
    everywhere, the parts of the optimizer in a checkpoint are the same under every layout.
    """
    for parameter in experts.parameters():
        parameter.allreduce = False


def count_sent_tokens(dispatcher: Any) -> None:
    """Make a dispatcher send what the row's routes say. Megatron takes k times the row's positions
    for what is sent (transformer/moe/token_dispatcher.py), padding included; release 0.19 and
    Transformer Engine's fused permutation then send so many. It is counted on the device and
    awaited before the permutation, as Megatron does where tokens may be dropped.
    """
    preprocess = dispatcher.preprocess

    def preprocess_row(routing_map: torch.Tensor) -> torch.Tensor:
        tokens_per_expert = preprocess(routing_map)
        dispatcher.num_out_tokens = routing_map.sum()
        dispatcher._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_expert

    dispatcher.preprocess = preprocess_row


def _tell_router(moe: Any) -> None:
    """Make a MoE layer tell its router about its row, `moe.row`, in each forward pass, and in the
    one that runs again in the backward pass, after other rows.
    """
    from megatron.core.tensor_parallel import checkpoint

    forward, runs_again = moe.forward, moe.moe_layer_recompute
    moe.moe_layer_recompute = False

    def row_forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[T', 1, H] to the same shape; experts have no biases."""
        row = moe.row

        def run(hidden_states: torch.Tensor) -> torch.Tensor:
            moe.router.row = row
            return forward(hidden_states)[0]

        return (checkpoint(run, False, hidden_states) if runs_again else run(hidden_states)), None

    moe.forward = row_forward


def set_replay(
    replay: RouterReplay, row: RowRouting, layer: int, logits: torch.Tensor, num_chosen: int
) -> None:
    """Make Megatron's replay of one router take the row's routes, record them, or do nothing.

    Args:
        layer: of the model, from 0.
        logits: [T', E]; positions without a route are sent to the experts of the largest ones.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    replay.clear_indices()
    replay.clear_router_replay_action()
    if row.routes is not None:
        ids = row.routes[layer].long()
        chosen = logits.detach().topk(num_chosen).indices
        replay.set_target_indices(torch.where(ids < 0, chosen, ids))
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    elif row.recorded is not None:
        replay.set_router_replay_action(RouterReplayAction.RECORD)


@cache
def row_router() -> type:
    """The class of the router. It is defined on demand, because it derives from a class of
    Megatron's.
    """
    from megatron.core.transformer.moe.moe_utils import (
        MoEAuxLossAutoScaler,
        topk_routing_with_score_function,
    )
    from megatron.core.transformer.moe.router import TopKRouter

    class RowRouter(TopKRouter):
        """Megatron's router. `row` is set before each forward pass."""

        row: RowRouting

        def routing(
            self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """The weights of the chosen experts, 0 of the others, and which are chosen, [T', E]
            each, from logits [T', 1, E]. Padding has none.
            """
            row, layer = self.row, self.layer_number - 1
            logits = logits.view(-1, self.config.num_moe_experts)
            if self.router_replay is not None:
                set_replay(self.router_replay, row, layer, logits, self.topk)
            weights, is_chosen = topk_routing_with_score_function(
                logits,
                self.topk,
                use_pre_softmax=self.config.moe_router_pre_softmax,
                router_replay=self.router_replay,
            )
            if row.recorded is not None and row.routes is None:
                row.recorded[layer] = self.router_replay.get_recorded_indices().short()
            is_chosen = is_chosen & row.is_token[:, None]
            # Of the passes of a layer that runs again, the one with a gradient counts.
            if torch.is_grad_enabled() and row.statistics is not None:
                weights = self._balanced(weights, logits, is_chosen)
            return weights, is_chosen

        def _balanced(
            self, weights: torch.Tensor, logits: torch.Tensor, is_chosen: torch.Tensor
        ) -> torch.Tensor:
            """The same weights, whose backward pass adds the gradients of the losses."""
            row, group = self.row, self.tp_cp_group
            losses = balance_losses(row, logits, is_chosen, self.topk, group)
            is_first = group.rank() == 0
            sums = statistics_of(row, logits, losses, self.topk, counts_sequences=is_first)
            row.statistics.add(self.layer_number - 1, is_chosen.sum(0), sums)
            if row.scales is None:
                return weights
            added = row.scales.load_balancing * losses.load_balancing
            added = added + row.scales.z_loss * losses.z_loss
            return MoEAuxLossAutoScaler.apply(weights, added)

    return RowRouter
