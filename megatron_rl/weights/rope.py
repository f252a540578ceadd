"""Rotary position embeddings (RoPE) as the `config.json` of a checkpoint describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError

DEFAULT_ROPE_THETA = 10000.0  # of transformers, for families that have no other
SCALINGS = ("linear", "llama3", "yarn")
ROPE_TYPES = ("default", *SCALINGS)  # supported by learner and engine
ORIGINAL = "original_max_position_embeddings"
# Those whose frequencies depend on the length that the model was trained with. Where a config does
# not say it, transformers takes max_position_embeddings, which may be the extended length.
SCALED_FROM_ORIGINAL = ("llama3", "yarn")


def rope_parameters(
    raw: dict[str, Any], default_theta: float = DEFAULT_ROPE_THETA
) -> dict[str, Any]:
    """The RoPE settings in the current format of transformers, `rope_parameters`, read from that
    format or from the older `rope_scaling` and `rope_theta`.

    Args:
        default_theta: of the model's family.
    """
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", default_theta))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if raw.get(ORIGINAL) is not None:  # Phi-3's place, which transformers prefers
        rope[ORIGINAL] = raw[ORIGINAL]
    return rope


def num_positions(raw: dict[str, Any]) -> int:
    """The longest sequence of a model: `max_position_embeddings` of its config. YaRN extends the
    original length by its factor, also where max_position_embeddings still holds the original
    length, as in the instructions of Qwen; vLLM 0.32 has to be told of the longer one.
    """
    rope, positions = rope_parameters(raw), raw["max_position_embeddings"]
    original = rope.get(ORIGINAL)
    if rope["rope_type"] != "yarn" or original is None:
        return positions
    return max(positions, int(rope["factor"] * original))


def check_scaling(raw: dict[str, Any], model_path: str | Path) -> None:
    """Raise DataError unless a RoPE scaling has a factor and, if it needs it, the length that the
    model was trained with.
    """
    rope = rope_parameters(raw)
    if rope["rope_type"] not in SCALINGS:
        return
    section = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    positions, kind, factor = raw["max_position_embeddings"], rope["rope_type"], rope["factor"]
    if not isinstance(factor, int | float) or not factor >= 1:
        raise DataError(
            f"{model_path}/config.json: expected a factor of at least 1 in {section} with "
            f"rope_type {kind}, got {factor!r}"
        )
    if kind not in SCALED_FROM_ORIGINAL or rope.get(ORIGINAL) is not None:
        return
    told = (
        f"expected {ORIGINAL} in {section} with rope_type {kind}, the length that the model was "
        f"trained with before it was extended, got none: write {ORIGINAL}={positions} there if "
        f"max_position_embeddings={positions} is that length"
    )
    if kind == "yarn":
        told += (
            f" (the context is then factor={factor:g} times as long), or {ORIGINAL}="
            f"{positions / factor:g} if it is the extended one"
        )
    raise DataError(f"{model_path}/config.json: {told}")
