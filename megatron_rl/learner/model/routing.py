"""What the routers of a mixture of experts are told about the row that they work on, and what they
write down about it.

A row holds sequences and padding. Padding is sent to no expert and counts nowhere. `RowRouting`
travels with the row through Megatron's layers, in its `packed_seq_params`, so that a layer that
runs again in the backward pass, after other rows, is told about its own row.

The losses that balance the experts, for a layer of E experts of which a token is sent to k:

    load balancing   mean over sequences of E sum_e f_e P_e, where f_e is the share of expert e in
                     the k n assignments of the sequence's n tokens, and P_e the mean over the
                     tokens of the softmax of the router's logits (Fedus et al. 2021, arXiv
                     2101.03961, eq. 4; per sequence as in DeepSeek-V3, arXiv 2412.19437, eq. 17)
    z-loss           mean over tokens of (log sum_e exp logit_e)^2 (Zoph et al. 2022, arXiv
                     2202.08906, eq. 5)

Both are means over the sequences or tokens of the mini-batch, so that neither the packing of rows
nor the layout changes them; of the layers, the sum is added to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

# For each layer of the model the experts of a row's positions on this rank, [T', k] int16; -1: the
# router chooses. Layers are numbered from 0.
Routes = dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceScales:
    """The factors with which the losses of single sequences and tokens enter Megatron's sum.

    Megatron divides the gradient of a mini-batch by the count of its loss contract, C: tokens or
    sequences, as `objective.normalize` says. A coefficient times C / (number of sequences) makes a
    sum over sequences a mean again; likewise for tokens.

    Example of 4 sequences with 40 tokens, 20 of which are the count, and coefficients 0.01 and
    0.001: `BalanceScales(load_balancing=0.05, z_loss=0.0005)`.
    """

    load_balancing: float
    z_loss: float


class RouterStatistics:
    """Sums over the tokens of this rank's rows, by layer."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        """
        Args:
            num_layers: of the whole model.
        """
        sizes = {"dtype": torch.float64, "device": device}
        self.loads = torch.zeros(num_layers, num_experts, **sizes)  # tokens sent
        # of each layer: tokens, sequences, and the sums over them of the entropy of the softmax, of
        # the margin, of the z-loss and of the load-balancing loss
        self.sums = torch.zeros(num_layers, 6, **sizes)

    def add(self, layer: int, loads: torch.Tensor, sums: torch.Tensor) -> None:
        """Add a row's [E] loads and [6] sums."""
        self.loads[layer] += loads.detach()
        self.sums[layer] += sums.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRouting:
    """A row as the routers of this rank see it: T' positions, which are T / CP, and with sequence
    parallelism T / (CP x TP).

    Example of a sequence of two tokens in a row of four positions: `RowRouting(sequence_ids=[0, 0,
    -1, -1], lengths=[2])`.
    """

    sequence_ids: torch.Tensor  # [T'] int64: -1 for padding, and everywhere in a row of filler
    lengths: torch.Tensor  # [S] float32: the tokens of every sequence, on all ranks of the row
    scales: BalanceScales | None = None  # of a training pass whose loss balances the experts
    statistics: RouterStatistics | None = None  # of a training pass
    routes: Routes | None = None  # the experts that positions are sent to; None: routers choose
    recorded: Routes | None = None  # takes the experts that routers choose

    @property
    def is_token(self) -> torch.Tensor:
        """Whether a position is sent to experts, [T'] bool."""
        return self.sequence_ids >= 0

    def by_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of each sequence on this rank: [T', ...] to [S, ...]."""
        sums = values.new_zeros(len(self.lengths) + 1, *values.shape[1:])
        return sums.index_add(0, self.sequence_ids + 1, values)[1:]  # padding is in the first one


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceLosses:
    """Of one layer and row, summed over this rank's tokens.

    Example: `BalanceLosses(load_balancing=tensor(1.02), z_loss=tensor(31.4))`.
    """

    load_balancing: torch.Tensor  # [] float32, this rank's part of the sum over the sequences
    z_loss: torch.Tensor  # [] float32, the sum over this rank's tokens


def balance_losses(
    row: RowRouting,
    logits: torch.Tensor,
    is_chosen: torch.Tensor,
    num_chosen: int,
    group: dist.ProcessGroup | None,
) -> BalanceLosses:
    """The losses of one layer. A collective over the ranks that share the row's positions.

    Args:
        logits: [T', E] float32, under gradient.
        is_chosen: [T', E] bool, False for padding.
        num_chosen: k.
        group: the ranks that share the row's positions; None: this rank has all of them.
    """
    num_experts = logits.shape[1]
    counts = row.by_sequence(is_chosen.float())
    if group is not None and group.size() > 1:
        dist.all_reduce(counts, group=group)
    lengths = row.lengths.clamp(min=1)[:, None]
    shares = counts / (num_chosen * lengths)
    means = row.by_sequence(torch.where(row.is_token[:, None], logits.softmax(-1), 0.0)) / lengths
    square = logits.logsumexp(-1).square()
    return BalanceLosses(
        load_balancing=num_experts * (shares * means).sum(),
        z_loss=torch.where(row.is_token, square, 0.0).sum(),
    )


def statistics_of(
    row: RowRouting,
    logits: torch.Tensor,
    losses: BalanceLosses,
    num_chosen: int,
    *,
    counts_sequences: bool,
) -> torch.Tensor:
    """[6] float64, as in `RouterStatistics.sums`.

    Args:
        counts_sequences: whether this rank counts the row's sequences: one of those that share it.
    """
    logits, is_token = logits.detach(), row.is_token
    logprobs = logits.log_softmax(-1).double()
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    highest = logits.topk(min(num_chosen + 1, logits.shape[1])).values
    margin = (highest[:, num_chosen - 1] - highest[:, -1]).double()
    num_sequences = (row.lengths > 0).sum(dtype=torch.float64)
    return torch.stack(
        [
            is_token.sum(dtype=torch.float64),
            num_sequences if counts_sequences else torch.zeros_like(num_sequences),
            torch.where(is_token, entropy, 0.0).sum(),
            torch.where(is_token, margin, 0.0).sum(),
            losses.z_loss.detach().double(),
            losses.load_balancing.detach().double(),
        ]
    )
