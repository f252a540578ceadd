"""The settings of a short run of the sharp model, as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def chain_sums(verifier: str) -> dict[str, Any]:
    """A task of `data.tasks`: sums of two numbers of two digits, scored by `verifier`."""
    return {
        "name": "chain_sum",
        "prompt_column": "metadata.expression",
        "template": "{prompt}=",
        "verifier": verifier,
        "options": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    }


def write_short_run(folder: Path, model: Path, sections: dict[str, dict[str, Any]]) -> Path:
    """`folder`/config.yaml; the keys of a section given replace those of the same section here."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "data": {"tasks": [chain_sums("tests.e2e.reward:count_digits")], "num_held_out": 4},
        "reward": {"num_workers": 1},
        "rollout": {
            "dtype": "float32",
            "num_threads": 1,
            "kv_cache_gib": 0.1,
            "max_num_seqs": 64,
            "sampling": {"max_tokens": 100},
        },
        "learner": {"tokens_per_micro_batch": 1024, "optimizer": {"learning_rate": 5e-3}},
        "eval": {"at_start": False, "at_end": False},
        "checkpoint": {"every": 0, "save_hf": False},
        "loop": {"num_steps": 4, "prompts_per_step": 8, "samples_per_prompt": 8},
    }
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
