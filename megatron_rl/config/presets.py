"""`objective.preset`: published methods as sets of settings.

`load_config` applies a preset over the defaults; settings from the YAML file or the command line
take precedence over it. A preset contains only the settings that define the method; batch sizes,
learning rates and lengths are left to the run. Presets without "dc" in their name switch the
constraint off, so that the gap is measured but not constrained.
"""

from __future__ import annotations

from typing import Any

_NO_CONSTRAINT: dict[str, Any] = {"enabled": False}
_TIS: dict[str, Any] = {"level": "token", "mode": "truncate", "upper": 2.0}

_OBJECTIVES: dict[str, dict[str, Any]] = {
    # arXiv 2402.03300; its KL term needs a reference: objective.kl.{coefficient,reference}
    "grpo": {
        "constraint": _NO_CONSTRAINT,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "normalize": "sequence_mean",
    },
    # arXiv 2503.14476: clip-higher, the token mean, and dynamic sampling (below); its penalty on
    # over-long responses needs a length: reward.overlong.buffer_tokens
    "dapo": {"constraint": _NO_CONSTRAINT, "clip_low": 0.2, "clip_high": 0.28},
    # arXiv 2503.20783: a token's weight does not depend on the length or the standard deviation
    "dr_grpo": {
        "constraint": _NO_CONSTRAINT,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "advantage_std": False,
        "normalize": "constant",
        "normalize_length": "${rollout.sampling.max_tokens}",
    },
    # arXiv 2507.18071
    "gspo": {
        "constraint": _NO_CONSTRAINT,
        "policy_loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "normalize": "sequence_mean",
    },
    # arXiv 2506.13585: no lower bound; the upper bound is ScaleRL's (arXiv 2510.13786)
    "cispo": {
        "constraint": _NO_CONSTRAINT,
        "policy_loss": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
    },
    # arXiv 2602.04879 with prime-rl's bounds; the old policy is the one that sampled
    "dppo_tv": {
        "constraint": _NO_CONSTRAINT,
        "policy_loss": "dppo_tv",
        "old_policy": "rollout",
        "clip_low": 0.2,
        "clip_high": 0.2,
    },
    # the engine as the old policy: PPO without recomputed log-probs
    "bypass": {"constraint": _NO_CONSTRAINT, "old_policy": "rollout"},
    # truncated importance sampling (Yao et al. 2025) with verl's bound
    "tis": {"constraint": _NO_CONSTRAINT, "importance": _TIS},
    "sequence_tis": {
        "constraint": _NO_CONSTRAINT,
        "importance": {"level": "sequence_sum", "mode": "truncate", "upper": 2.0},
    },
    # arXiv 2510.18855
    "icepop": {
        "constraint": _NO_CONSTRAINT,
        "importance": {"level": "token", "mode": "mask", "lower": 0.5, "upper": 5.0},
    },
    # TRL's sequence_mask
    "sequence_mask": {
        "constraint": _NO_CONSTRAINT,
        "importance": {"level": "sequence_sum", "mode": "mask", "upper": 3.0},
    },
    # verl's geometric rejection with its veto
    "geometric_rejection": {
        "constraint": _NO_CONSTRAINT,
        "rejection": {
            "divergence": "k1",
            "level": "sequence_mean",
            "lower": 0.999,
            "upper": 1.001,
            "veto_ratio": 1e-4,
        },
    },
    "k3_rejection": {
        "constraint": _NO_CONSTRAINT,
        "rejection": {"divergence": "k3", "level": "sequence_mean", "upper": 0.01},
    },
    # arXiv 2606.08779: the defaults, under a name
    "dc_grpo": {"constraint": {"enabled": True}},
    "dc_grpo_centered": {"constraint": {"enabled": True, "baseline": "batch"}},
    "dc_grpo_penalty": {"constraint": {"enabled": True, "penalty": "differentiable"}},
    "dc_grpo_tis": {"constraint": {"enabled": True}, "importance": _TIS},
}

_OTHER_SECTIONS: dict[str, dict[str, Any]] = {
    "dapo": {"loop": {"dynamic_sampling": {"enabled": True}}},
}

PRESETS: dict[str, dict[str, Any]] = {
    name: {"objective": {**objective, "preset": name}, **_OTHER_SECTIONS.get(name, {})}
    for name, objective in _OBJECTIVES.items()
}
