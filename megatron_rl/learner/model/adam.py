"""An AdamW with the same state layout as the FusedAdam of Transformer Engine and apex.

If neither is installed, Megatron-Core falls back to torch's AdamW, which has a `step` for each
parameter. Megatron's distributed checkpoints cannot store that: optimizer/distrib_optimizer.py
looks for `step` in the parameter groups. This optimizer counts steps in the group, so that a run
without Transformer Engine can save, load and reshard its checkpoints. The arithmetic is torch's own
functional AdamW (Loshchilov and Hutter, arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.optim.adamw import adamw

from megatron_rl.config.choices import AdamImplementation


class FusedLayoutAdamW(torch.optim.Optimizer):
    """AdamW with `step` in the parameter group; the state of a parameter consists of `exp_avg` and
    `exp_avg_sq` only.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,  # passed by Megatron-Core 0.19, not by 0.16
    ) -> None:
        if not adam_w_mode:
            raise ValueError(
                "FusedLayoutAdamW: expected decoupled weight decay (AdamW), got adam_w_mode=False"
            )
        if capturable:
            raise ValueError(
                "FusedLayoutAdamW: expected no capture in a CUDA graph, got capturable=True"
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One AdamW update of every parameter that has a gradient."""
        assert closure is None, "closures are not used by Megatron"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            # torch's kernel adds 1 to the step count that it receives
            counts = [
                torch.tensor(float(group["step"] - 1), device=param.device) for param in params
            ]
            adamw(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                counts,
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def use_adam(implementation: AdamImplementation) -> None:
    """Make Megatron-Core use an implementation of Adam; not auto. Idempotent."""
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    if implementation == "transformer_engine":
        from transformer_engine.pytorch.optimizers import FusedAdam as adam
    elif implementation == "apex":
        from apex.optimizers import FusedAdam as adam
    else:
        adam = FusedLayoutAdamW
    megatron_optimizer.Adam = adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    # The distributed optimizer reads the state in the layout that it knows, and accepts only the
    # class that it knows as Adam. FusedLayoutAdamW has Apex's layout.
    distrib_optimizer.Adam = adam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = implementation == "transformer_engine"
    distrib_optimizer.USING_APEX_OPTIMIZER = implementation != "transformer_engine"
