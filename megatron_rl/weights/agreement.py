"""Checks that the tensors of a checkpoint are those that its `config.json` describes.

Learner and engine each have a rule of their own for a checkpoint that contradicts itself. vLLM, for
example, gives a tied model a head of its own if the checkpoint holds one
(vllm/config/model.py, `maybe_untie_word_embeddings`), and ties it again if the two are equal. A
checkpoint that leaves such a choice open is therefore refused before anything is started.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rl.errors import DataError
from megatron_rl.weights.families.family import find_family
from megatron_rl.weights.geometry import Geometry
from megatron_rl.weights.huggingface import DEAD_BUFFERS, CheckpointReader
from megatron_rl.weights.rules import hf_shapes, tensor_rules

CONFIG_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError)  # of transformers
FLOATING = ("F", "BF")  # how safetensors' names of such formats begin
COMPARED_ROWS = 8192  # read at a time when a head is compared with the embedding


def check_checkpoint(folder: str | Path, geometry: Geometry) -> None:
    """Check the tensors of a checkpoint against its geometry; reads the files' headers only, and
    both matrices of a tied model that holds a head.

    Raises:
        DataError: a file is missing or truncated, two files contradict each other, or a tensor is
            missing, unexpected, of another shape, of whole numbers, or a head that differs from its
            embedding.
    """
    _check_config(folder)
    reader = CheckpointReader(folder)
    reader.check_whole()
    names = set(model_names(reader.names, geometry))
    for rule in tensor_rules(geometry):
        for name, shape in zip(rule.hf_names, hf_shapes(rule, geometry), strict=True):
            if name not in names:
                raise DataError(f"{folder}: {_missing(name, geometry)}")
            names.remove(name)
            if reader.shape(name) != shape:
                raise DataError(
                    f"{folder}: checkpoint tensor {name}: expected shape {list(shape)} from "
                    f"config.json, got {list(reader.shape(name))}; one of the two belongs to "
                    "another model"
                )
            if not reader.dtype(name).startswith(FLOATING):
                raise DataError(
                    f"{folder}: checkpoint tensor {name}: expected floating-point numbers, got "
                    f"{reader.dtype(name)}; the weights of a quantised checkpoint cannot be "
                    "trained, give the one that it was made of"
                )
    if names:
        raise DataError(
            f"{folder}: expected the tensors of the {geometry.num_layers} layers in config.json, "
            f"got {len(names)} others, the first is {min(names)}; correct config.json"
        )
    if geometry.is_tied and head_name(geometry) in reader.names:
        _check_equal_head(reader, geometry, folder)


def model_names(names: list[str], geometry: Geometry) -> list[str]:
    """Those tensors of a checkpoint that a model of this geometry has: without buffers that no
    model reads and, if the head is tied, without the copy of it that some tools write.
    """
    copy = head_name(geometry) if geometry.is_tied else None
    return [name for name in names if name != copy and not name.endswith(DEAD_BUFFERS)]


def head_name(geometry: Geometry) -> str:
    """The name of the head's tensor in checkpoints of this family."""
    return find_family(geometry.model_type).head.hf_names[0]


def _check_config(folder: str | Path) -> None:
    """DataError unless transformers, which engine and tokenizer use, accepts the config."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True)
    except (*CONFIG_ERRORS, StrictDataclassError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{folder}/config.json: expected what transformers accepts, got: {reason}"
        ) from error


def _missing(name: str, geometry: Geometry) -> str:
    if name == head_name(geometry):
        return (
            f"expected a tensor {name}, got none; if the head is the embedding, set "
            "tie_word_embeddings to true in config.json"
        )
    return (
        f"expected a tensor {name} of the {geometry.num_layers} layers in config.json, got none; "
        "correct config.json, or save the checkpoint again"
    )


def _check_equal_head(reader: CheckpointReader, geometry: Geometry, folder: str | Path) -> None:
    head, embedding = head_name(geometry), find_family(geometry.model_type).embedding.hf_names[0]
    is_equal = reader.shape(head) == reader.shape(embedding) and all(
        torch.equal(
            reader.read(head, 0, start, start + COMPARED_ROWS).double(),
            reader.read(embedding, 0, start, start + COMPARED_ROWS).double(),
        )
        for start in range(0, geometry.vocab_size, COMPARED_ROWS)
    )
    if not is_equal:
        raise DataError(
            f"{folder}: expected a head equal to the embedding, since config.json has "
            f"tie_word_embeddings=true, got a {head} that differs from {embedding}; set "
            "tie_word_embeddings to false to train the head on its own, or delete the tensor"
        )
