"""What test_transformer_engine.py runs in a process of its own: every simulated rank's part of a
model with the layers of Transformer Engine on the meta device, beside our table of names, the
export, and Megatron's own layers.

    python -m tests.learner.support.te_names PACKAGES OUT SHAPE ...

PACKAGES is the folder of the pure-Python wheel, a SHAPE a folder with a config.json. Writes OUT, a
JSON object: by shape and layout, what was found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.compiled_part import install

if __name__ == "__main__":  # before anything imports Megatron
    PACKAGE = install(Path(sys.argv[1]))

import torch

from megatron_rl.config import Config, KernelConfig, ModelConfig, ParallelConfig
from megatron_rl.learner.layout.parallel import Parallel
from megatron_rl.learner.layout.simulated import simulated_rank
from megatron_rl.learner.model.build import held_parameters, tensor_place
from megatron_rl.learner.model.meta import meta_parts
from megatron_rl.plan.simulate import problems_in, simulate
from megatron_rl.weights.geometry import Geometry, read_geometry
from megatron_rl.weights.rules import TensorRule, hf_shapes, shard_from_hf

LAYOUTS = {
    "tp1": (1, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "tp4_pp2": (8, {"tensor": 4, "pipeline": 2}),
}
EXPERT_LAYOUTS = {
    "tp2_ep2": (2, {"tensor": 2, "sequence_parallel": True, "expert": 2}),
    "ep2_etp2": (4, {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 2}),
    "ep4_pp2": (8, {"pipeline": 2, "expert": 4}),
}


def model_of(shape: Path, layers: str) -> ModelConfig:
    kernels = KernelConfig(layers=layers)
    return ModelConfig(path=str(shape), dtype="bfloat16", kernels=kernels)


def shard_shape(rule: TensorRule, geometry: Geometry, parallel: Parallel) -> tuple[int, ...]:
    """The shape of this rank's shard by our table, from slices without contents."""
    shapes = dict(zip(rule.hf_names, hf_shapes(rule, geometry), strict=True))

    def read(name: str, dimension: int | None, start: int, stop: int) -> torch.Tensor:
        shape = list(shapes[name])
        if dimension is not None:
            shape[dimension] = max(0, min(stop, shape[dimension]) - start)
        return torch.empty(shape, device="meta")

    shard = shard_from_hf(rule, geometry, read, *tensor_place(rule, parallel))
    return tuple(shard.shape)


def wrong_names(
    parts: Sequence[torch.nn.Module], geometry: Geometry, parallel: Parallel
) -> list[str]:
    """Parameters that our table does not know, or with another shape."""
    names = {id(each): name for part in parts for name, each in part.named_parameters()}
    found = []
    for rule, parameter in held_parameters(geometry, parallel, parts):
        name, expected = names.pop(id(parameter), "twice"), shard_shape(rule, geometry, parallel)
        if tuple(parameter.shape) != expected:
            found.append(f"{name}: expected {expected}, got {tuple(parameter.shape)}")
        if parameter.device.type != "meta":
            found.append(f"{name}: has memory")
    return found + [f"unknown: {name}" for name in names.values()]


def checkpoint_keys(parts: Sequence[torch.nn.Module]) -> tuple[set[Any], set[str]]:
    """Of a distributed checkpoint: keys and global shapes of tensors, and keys of other objects."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    tensors, objects = set(), set()
    for part in parts:
        state = part.sharded_state_dict()
        apply_factories(state)
        for value in nested_values(state):
            if isinstance(value, ShardedTensor):
                tensors.add((value.key, tuple(value.global_shape)))
            else:
                objects.add(value.key)
    return tensors, objects


def compare(shape: Path, layout: str) -> dict[str, Any]:
    world_size, sizes = (LAYOUTS | EXPERT_LAYOUTS)[layout]
    geometry, parallel_config = read_geometry(shape), ParallelConfig(**sizes)
    found: dict[str, Any] = {"names": [], "only_one": [], "objects": [], "num_parameters": 0}
    for rank in range(world_size):
        with simulated_rank(parallel_config, rank=rank, world_size=world_size) as parallel:
            ours = meta_parts(model_of(shape, "megatron"), geometry, parallel)
            theirs = meta_parts(model_of(shape, "transformer_engine"), geometry, parallel)
            found["names"] += wrong_names(theirs, geometry, parallel)
            found["names"] += wrong_names(ours, geometry, parallel)
            found["num_parameters"] += sum(len(list(part.parameters())) for part in theirs)
            keys, other = checkpoint_keys(theirs), checkpoint_keys(ours)
            found["only_one"] += sorted(map(str, keys[0] ^ other[0]))
            found["objects"] += sorted(keys[1] ^ other[1])
            layer = theirs[0].decoder.layers[0]
            found["modules"] = [
                type(each).__module__.split(".")[0] + "." + type(each).__name__
                for each in (layer.self_attention.linear_qkv, _second_linear(layer.mlp))
            ]
    config = Config(model=model_of(shape, "transformer_engine"), parallel=parallel_config)
    found["export"] = problems_in(simulate(config, geometry, world_size=world_size), geometry)
    return found


def _second_linear(mlp: Any) -> torch.nn.Module:
    return mlp.experts.linear_fc2 if hasattr(mlp, "experts") else mlp.linear_fc2


def small(shape: Path) -> Path:
    """The shape with few layers and experts, beside it: all of them have the same names."""
    raw = json.loads((shape / "config.json").read_text())
    raw["num_hidden_layers"] = 4
    raw |= {key: 8 for key in ("num_experts", "num_local_experts") if key in raw}
    raw |= {key: 2 for key in ("num_experts_per_tok",) if key in raw}
    raw.pop("layer_types", None)
    folder = Path(sys.argv[2]).with_name(shape.name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def layouts_of(shape: Path) -> dict[str, Any]:
    """Those that the test compares for it."""
    is_mixture = read_geometry(shape).experts is not None
    return EXPERT_LAYOUTS if is_mixture else LAYOUTS


def main(out: Path, shapes: Sequence[Path]) -> None:
    found = {
        f"{shape.name}.{layout}": compare(small(shape), layout)
        for shape in shapes
        for layout in layouts_of(shape)
    }
    found["version"] = PACKAGE.__version__
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
