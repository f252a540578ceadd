"""All sets of choices that settings have, each defined once.

A fixed set is a `Literal` type: the settings' dataclasses use it as a field's type, and
`typing.get_args` returns its members at run time. If a choice is added by adding a file to a
folder, the choices are the names of that folder's modules (`modules_in`).

This module imports no other module of the package, so that any module can import it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, get_args

_PACKAGE = Path(__file__).parents[1]


def module_names(folders: Iterable[str], *, support: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the modules in folders, such as a package's `__path__`, sorted; none is imported.

    Args:
        support: modules that the others share, which are left out. So are names that begin with an
            underscore.
    """
    names = {module.name for module in pkgutil.iter_modules(list(folders))}
    return tuple(sorted(n for n in names if not n.startswith("_") and n not in support))


def modules_in(folder: str, *, support: Collection[str] = ()) -> tuple[str, ...]:
    """`module_names` of a folder of megatron_rl.

    Args:
        folder: path below megatron_rl, for instance "reward/verifiers".

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = _PACKAGE / folder
    if not path.is_dir():
        raise FileNotFoundError(f"expected a folder of modules at {path}, found none")
    return module_names([str(path)], support=support)


# model, learner, data
DType = Literal["float32", "bfloat16"]
Decay = Literal["constant", "linear", "cosine"]
Recompute = Literal["auto", "always"]
RoutingReplay = Literal["none", "recomputed", "rollout"]
ActivationRecomputation = Literal["none", "selective", "full"]
LayerImplementation = Literal["auto", "transformer_engine", "megatron"]
AttentionKernel = Literal["auto", "flash", "fused", "unfused"]
FP8Recipe = Literal["none", "delayed", "current", "blockwise"]
AdamImplementation = Literal["auto", "transformer_engine", "apex", "torch"]
ChatTemplate = Literal["auto", "never", "always"]
Repeats = Literal["drop", "keep"]
OverlongPrompts = Literal["error", "drop"]
UnreadableAnswers = Literal["error", "drop"]

# rollout
QuantizationFormat = Literal["none", "int8", "fp8", "int4", "int8_w8a8"]
QuantizationStrategy = Literal["channel", "group", "block"]
TopKTies = Literal["auto", "all", "exact"]
Placement = Literal["auto", "share", "colocated", "nodes"]
HandOut = Literal["in_order", "finished"]
LateGroups = Literal["wait", "drop"]
ENVIRONMENTS = ("single_turn", *modules_in("rollout/tools"))

# objective
OldPolicy = Literal["recomputed", "rollout"]
# How a group's advantages are scaled: by the standard deviation with 1 / G, or with 1 / (G - 1).
AdvantageStd = Literal["none", "population", "unbiased"]
Normalize = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]
# The signal of a token that the constraint is about: |p_train - p_inf|, |rho - 1| or |log rho|.
Measure = Literal["probability", "ratio", "log_ratio"]
# What lambda multiplies: a part of the advantage, or a term of the loss under gradient.
SquaredPenalty = Literal["squared_difference", "squared_ratio", "squared_log_ratio"]
DifferentiablePenalty = Literal["differentiable", SquaredPenalty]
Penalty = Literal["shaping", DifferentiablePenalty]
SQUARED_PENALTIES = get_args(SquaredPenalty)
Gate = Literal["batch", "mean", "token"]
Baseline = Literal["none", "batch"]
ToleranceAbove = Literal["zero", "fresh_gap"]
ImportanceMode = Literal["truncate", "mask", "cis"]
# The value that a bound applies to: a token's, or the sum, mean or maximum over a sequence.
ImportanceLevel = Literal["token", "sequence_sum", "sequence_mean"]
RejectionLevel = Literal[ImportanceLevel, "sequence_max"]
# Estimators of a KL divergence (Schulman 2020, "Approximating KL divergence").
KLEstimator = Literal["k1", "k2", "k3"]
POLICY_LOSSES = modules_in("objective/policy")
SEQUENCE_LOSSES = ("gspo",)  # whose ratio is a sequence's, so that no token of it can be corrected
ABSOLUTE_BOUND_LOSSES = ("cispo", "dppo_tv")  # for which clip_low=1 means no lower bound

# reward
VERIFIERS = modules_in("reward/verifiers")
GROUP_VERIFIERS = modules_in("reward/group_verifiers")

# tracking
TrackingMode = Literal["offline", "online"]
TRACKERS = modules_in("observe/trackers", support=("tracker",))

# sync
# What becomes of requests that run when the weights change: they end first; they go on with the
# cache of the old weights; or they go on after their cache was computed again.
RunningRequests = Literal["wait", "keep", "recompute"]
TRANSPORTS = modules_in("sync/transports", support=("transport",))
