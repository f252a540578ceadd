"""`objective.preset`: published methods as sets of settings.

`load_config` applies a preset over the defaults; settings from the YAML file or the command line
take precedence over it, and a run names each of them when it starts (`replaced_keys`). A preset
contains only the settings that define the method; batch sizes, learning rates, lengths, lambda's
start and its tolerance are left to the run. docs/corrections.md has the source, the keys and the
test of every preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What every preset sets unless its entry below says otherwise: the surrogate of DC-GRPO's Eq. 10
# (arXiv 2606.08779) without the constraint, so that corrections of the gap and forms of the
# constraint differ in nothing else.
COMMON: dict[str, Any] = {
    "policy_loss": "ppo_clip",
    "old_policy": "recomputed",
    "clip_low": 0.2,
    "clip_high": 0.24,
    "ratio_cap": "auto",
    "dual_clip": 0.0,
    "normalize": "sequence_mean",
    "advantage_std": "population",
    "constraint": {"enabled": False},
    "importance": {"level": "none"},
    "rejection": {"divergence": "none"},
    "score_centering": {"enabled": False},
    "acceptance": {"enabled": False},
}
# The constraint as published: a penalty on every token's advantage, in every step.
_SHAPING: dict[str, Any] = {
    "enabled": True,
    "measure": "probability",
    "penalty": "shaping",
    "gate": "batch",
    "baseline": "none",
}
_TIS: dict[str, Any] = {"level": "token", "mode": "truncate", "lower": 0.0, "upper": 2.0}
_CENTERING: dict[str, Any] = {"enabled": True}

_OBJECTIVES: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300; its KL term needs a reference: objective.kl.{coefficient,reference}
    "grpo": {"clip_high": 0.2},
    # arXiv 2503.14476: clip-higher, the token mean, and dynamic sampling (below); its penalty on
    # over-long responses needs a length: reward.overlong.buffer_tokens
    "dapo": {"clip_high": 0.28, "normalize": "token_mean"},
    # arXiv 2503.20783: a token's weight does not depend on the length or the standard deviation
    "dr_grpo": {
        "clip_high": 0.2,
        "advantage_std": "none",
        "normalize": "constant",
        "normalize_length": "${rollout.sampling.max_tokens}",
    },
    # arXiv 2507.18071
    "gspo": {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2506.13585: no lower bound; the upper bound is ScaleRL's (arXiv 2510.13786)
    "cispo": {
        "policy_loss": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "normalize": "token_mean",
    },
    # arXiv 2602.04879 with prime-rl's bounds and mean; the old policy is the one that sampled, and
    # ratio_cap=auto is verl's 20
    "dppo_tv": {
        "policy_loss": "dppo_tv",
        "old_policy": "rollout",
        "clip_high": 0.2,
        "normalize": "token_mean",
    },
    # the engine as the old policy: PPO without recomputed log-probs
    "bypass": {"old_policy": "rollout"},
    # truncated importance sampling (Yao et al. 2025) with verl's bound
    "tis": {"importance": _TIS},
    "sequence_tis": {
        "importance": {"level": "sequence_sum", "mode": "truncate", "lower": 0.0, "upper": 2.0},
    },
    # arXiv 2510.18855
    "icepop": {"importance": {"level": "token", "mode": "mask", "lower": 0.5, "upper": 5.0}},
    # arXiv 2609.32444
    "cis": {"importance": {"level": "token", "mode": "cis", "cis_slope": 2.3, "cis_floor": 5e-3}},
    # arXiv 2606.29526: weights against the engine, and updates that are taken back
    "mipu": {"importance": _TIS, "acceptance": {"enabled": True}},
    # TRL's sequence_mask
    "sequence_mask": {
        "importance": {"level": "sequence_sum", "mode": "mask", "lower": 0.0, "upper": 3.0},
    },
    # verl's geometric rejection with its veto
    "geometric_rejection": {
        "rejection": {
            "divergence": "k1",
            "level": "sequence_mean",
            "lower": 0.999,
            "upper": 1.001,
            "veto_ratio": 1e-4,
        },
    },
    "k3_rejection": {
        "rejection": {"divergence": "k3", "level": "sequence_mean", "lower": 0.0, "upper": 0.01},
    },
    # arXiv 2609.20807: the score of a token less its mean under the engine, alone and with TIS
    "score_centering": {"score_centering": _CENTERING},
    "score_centering_tis": {"score_centering": _CENTERING, "importance": _TIS},
    # arXiv 2606.08779, Alg. 1: the defaults, under a name
    "dc_grpo": {"constraint": _SHAPING},
    # its pilot, before the Lagrangian: a weight of 1 from the start, which stays
    "dual_grpo": {"constraint": {**_SHAPING, "fixed_lambda": 1.0}},
    "dc_grpo_centered": {"constraint": {**_SHAPING, "baseline": "batch"}},
    "dc_grpo_penalty": {"constraint": {**_SHAPING, "penalty": "differentiable"}},
    # the same, on the part of the gap that comes from age
    "dc_grpo_age_penalty": {
        "constraint": {**_SHAPING, "penalty": "differentiable", "tolerance_above": "fresh_gap"},
    },
    # its App. B: the penalties of its theory, estimated on the engine's tokens
    "dc_grpo_squared_difference": {"constraint": {**_SHAPING, "penalty": "squared_difference"}},
    "dc_grpo_squared_ratio": {"constraint": {**_SHAPING, "penalty": "squared_ratio"}},
    "dc_grpo_squared_log_ratio": {"constraint": {**_SHAPING, "penalty": "squared_log_ratio"}},
    "dc_grpo_tis": {"constraint": _SHAPING, "importance": _TIS},
    "dc_grpo_score_centering": {"constraint": _SHAPING, "score_centering": _CENTERING},
}

_OTHER_SECTIONS: dict[str, dict[str, Any]] = {
    "dapo": {"loop": {"dynamic_sampling": {"enabled": True}}},
}

PRESETS: dict[str, dict[str, Any]] = {
    name: {"objective": {**COMMON, **objective, "preset": name}, **_OTHER_SECTIONS.get(name, {})}
    for name, objective in _OBJECTIVES.items()
}


def dotted(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names and values: `{"loop": {"seed": 1}}` is `{"loop.seed": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        flat |= dotted(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return flat
