"""Writes the rollouts of every step to disk and reads them back, for inspection and for replay
without an engine.

    step_000012.rank0.jsonl                    one line per sample, readable: texts and rewards
    step_000012.rank0.safetensors              rewards again, and the values of every token
    step_000012.rank0.recomputed.safetensors   log-probs, by the learner's rank that computed them

Each file is written under a temporary name and renamed when it is complete. All samples of a group
are in the files of the rank that scored it; the recomputed log-probs of a sample are in the file of
the rank that the sample was dealt to.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from megatron_rl.errors import DataError
from megatron_rl.records import (
    JudgedGroup,
    Prompt,
    Rollout,
    RolloutGroup,
    RolloutHead,
    Score,
    ScoredGroup,
)
from megatron_rl.rollout.routes import pack_routes, split_routes

FILE_NAME = re.compile(r"step_(\d{6,})\.rank(\d+)\.(jsonl|safetensors|recomputed\.safetensors)")


def write_step(
    folder: Path, step: int, rank: int, groups: Sequence[JudgedGroup], *, num_ranks: int
) -> None:
    """Write one rank's groups of a step. A rank without groups writes files without samples.

    Args:
        rank: index among the ranks that write, 0 to num_ranks - 1. `read_step` requires the files
            of all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        _line(step, judged.group.prompt, index, rollout, score, advantage)
        for judged in groups
        for index, (rollout, score, advantage) in enumerate(
            zip(judged.group.rollouts, judged.scores, judged.advantages, strict=True)
        )
    ]
    metadata = {"num_ranks": str(num_ranks), "num_samples": str(len(lines))}
    stem = f"step_{step:06d}.rank{rank}"
    rollouts = [rollout for judged in groups for rollout in judged.group.rollouts]
    tensors = _tensors(lines, rollouts) | _heads(rollouts) | pack_routes(rollouts)
    _write(folder / f"{stem}.safetensors", save(tensors, metadata))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape.
    _write(folder / f"{stem}.jsonl", text.encode(errors="backslashreplace"))


def write_recomputed(
    folder: Path,
    step: int,
    rank: int,
    *,
    prompt_index: Sequence[int],
    sample_index: Sequence[int],
    lengths: Sequence[int],
    recomputed_logprobs: torch.Tensor,
) -> None:
    """Write the log-probs that the learner recomputed for the samples dealt to one rank.

    Args:
        prompt_index, sample_index: [S] the samples' positions in the step.
        lengths: [S] in tokens, prompt included.
        recomputed_logprobs: [sum of lengths] float32, one sequence after another; position t
            belongs to token t of the sequence, as in Rollout; 0.0 where the mask is False.

    Raises:
        ValueError: the length of `recomputed_logprobs` is not the sum of `lengths`.
    """
    if recomputed_logprobs.shape != (sum(lengths),):
        raise ValueError(
            f"recomputed_logprobs: expected [{sum(lengths)}], the sum of lengths, "
            f"got {list(recomputed_logprobs.shape)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "prompt_index": torch.tensor(list(prompt_index), dtype=torch.int64),
        "sample_index": torch.tensor(list(sample_index), dtype=torch.int64),
        "lengths": torch.tensor(list(lengths), dtype=torch.int64),
        "recomputed_logprobs": recomputed_logprobs.detach().to("cpu", torch.float32).contiguous(),
    }
    _write(folder / f"step_{step:06d}.rank{rank}.recomputed.safetensors", save(tensors))


def read_step(folder: Path, step: int) -> list[ScoredGroup]:
    """All ranks' groups of a step with their scores, sorted by prompt index. Every number is
    exactly the one that was written.

    Raises:
        DataError: a file is missing, truncated, or inconsistent with its counterpart; the message
            names it.
    """
    scored = [each for stem in _stems(folder, step) for each in _read_rank(stem)]
    return sorted(scored, key=lambda each: each.group.prompt.index)


def has_step(folder: Path, step: int) -> bool:
    """Whether a step was recorded."""
    return (folder / f"step_{step:06d}.rank0.safetensors").is_file()


def read_samples(folder: Path, step: int) -> list[dict[str, Any]]:
    """All ranks' samples of a step, sorted by prompt and sample index: the keys of the JSONL file,
    `token_ids`, `loss_mask`, `rollout_logprobs` and `weight_versions` as arrays [L], `head` and
    `routes`.

    Raises:
        DataError: as `read_step`.
    """
    samples = [line for stem in _stems(folder, step) for line in _read_samples(stem)]
    return sorted(samples, key=lambda line: (line["prompt_index"], line["sample_index"]))


def _stems(folder: Path, step: int) -> list[Path]:
    """The paths, without their suffix, of the files of every rank that wrote the step."""
    first = folder / f"step_{step:06d}.rank0.safetensors"
    num_ranks = int(_open(first)[1].get("num_ranks", "1"))
    return [folder / f"step_{step:06d}.rank{rank}" for rank in range(num_ranks)]


def read_recomputed(folder: Path, step: int) -> dict[tuple[int, int], torch.Tensor]:
    """The recomputed log-probs of each sample, [L] float32, by (prompt index, sample index). Empty
    if none were written.

    Raises:
        DataError: a file is truncated; the message names it.
    """
    result: dict[tuple[int, int], torch.Tensor] = {}
    for path, found_step in _step_files(folder):
        if found_step != step or not path.name.endswith(".recomputed.safetensors"):
            continue
        tensors, _ = _open(path)
        pieces = tensors["recomputed_logprobs"].split(tensors["lengths"].tolist())
        keys = zip(tensors["prompt_index"].tolist(), tensors["sample_index"].tolist())
        result.update(zip(keys, pieces, strict=True))
    return result


def truncate_after(folder: Path, step: int) -> None:
    """Delete the files of steps after `step`, because a resumed run writes them again."""
    for path, found_step in _step_files(folder):
        if found_step > step:
            path.unlink()


def forget_before(folder: Path, step: int) -> None:
    """Delete the files of the steps before `step`. Another rank may be deleting its own."""
    for path, found_step in _step_files(folder):
        if found_step < step:
            path.unlink(missing_ok=True)


def _line(
    step: int, prompt: Prompt, sample_index: int, rollout: Rollout, score: Score, advantage: float
) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_index": prompt.index,
        "sample_index": sample_index,
        "source": prompt.source,
        "prompt": prompt.text,
        "response": rollout.text,
        "answer": prompt.answer,
        "reward": float(score.reward),
        "group_reward": float(score.group_reward),
        "verifier_rewards": dict(score.verifier_rewards),
        "advantage": float(advantage),
        "is_formatted": score.is_formatted,
        "failure": score.failure,
        "finish_reason": rollout.finish_reason,
        "num_prompt_tokens": len(prompt.token_ids),
        "num_tokens": len(rollout.token_ids),
        "engine": rollout.engine,
        "metadata": prompt.metadata,
    }


# The first table holds one value per sample, the second one value per token, with the samples
# concatenated. float64 represents every Python float, so the log-probs are read back exactly.
SAMPLE_TENSORS = {
    "prompt_index": torch.int64,
    "sample_index": torch.int64,
    "reward": torch.float64,
    "advantage": torch.float64,
}
TOKEN_TENSORS = {
    "token_ids": torch.int64,
    "loss_mask": torch.bool,
    "rollout_logprobs": torch.float64,
    "weight_versions": torch.int64,
}


def _tensors(
    lines: Sequence[dict[str, Any]], rollouts: Sequence[Rollout]
) -> dict[str, torch.Tensor]:
    tensors = {
        key: torch.tensor([line[key] for line in lines], dtype=dtype)
        for key, dtype in SAMPLE_TENSORS.items()
    }
    for key, dtype in TOKEN_TENSORS.items():
        pieces = [torch.from_numpy(getattr(rollout, key)).to(dtype) for rollout in rollouts]
        tensors[key] = torch.cat([torch.zeros(0, dtype=dtype), *pieces])
    tensors["lengths"] = torch.tensor([line["num_tokens"] for line in lines], dtype=torch.int64)
    return tensors


HEAD_IDS, HEAD_LOGPROBS = "head_ids", "head_logprobs"  # [response tokens, K], if there are heads


def _heads(rollouts: Sequence[Rollout]) -> dict[str, torch.Tensor]:
    """The heads of all response tokens, one rollout after another. They are in no JSONL file, which
    they would make K times as long.
    """
    heads = [rollout.head for rollout in rollouts if rollout.num_response_tokens]
    if all(head is None for head in heads):
        return {}
    return {
        HEAD_IDS: torch.from_numpy(np.concatenate([head.token_ids for head in heads])),
        HEAD_LOGPROBS: torch.from_numpy(np.concatenate([head.logprobs for head in heads])),
    }


def _split_heads(
    tensors: dict[str, torch.Tensor], masks: Sequence[np.ndarray]
) -> list[RolloutHead | None]:
    """The head of each sample, by the loss masks of the samples."""
    if HEAD_IDS not in tensors:
        return [None] * len(masks)
    counts = [int(np.count_nonzero(mask)) for mask in masks]
    pieces = (tensors[key].split(counts) for key in (HEAD_IDS, HEAD_LOGPROBS))
    return [
        RolloutHead(token_ids=ids.numpy(), logprobs=logprobs.numpy()) if len(ids) else None
        for ids, logprobs in zip(*pieces, strict=True)
    ]


def _read_rank(stem: Path) -> Iterator[ScoredGroup]:
    """The groups of one rank."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for line in _read_samples(stem):
        groups.setdefault(line["prompt_index"], []).append(line)
    for samples in groups.values():
        samples.sort(key=lambda line: line["sample_index"])
        yield ScoredGroup(
            group=RolloutGroup(prompt=_prompt(samples[0]), rollouts=tuple(map(_rollout, samples))),
            scores=tuple(map(_score, samples)),
        )


def _read_samples(stem: Path) -> Iterator[dict[str, Any]]:
    """The samples of one rank: texts from the JSONL file, numbers from the safetensors file."""
    lines = _read_lines(Path(f"{stem}.jsonl"))
    tensors, metadata = _open(Path(f"{stem}.safetensors"))
    if len(lines) != int(metadata.get("num_samples", "-1")):
        raise DataError(
            f"{stem}.jsonl: expected {metadata.get('num_samples')} samples as in {stem.name}"
            f".safetensors, got {len(lines)}; delete the step, or record it again"
        )
    lengths = tensors["lengths"].tolist()
    columns = {key: tensors[key].tolist() for key in SAMPLE_TENSORS}
    columns |= {
        key: [piece.numpy() for piece in tensors[key].split(lengths)] for key in TOKEN_TENSORS
    }
    columns["head"] = _split_heads(tensors, columns["loss_mask"])
    columns["routes"] = split_routes(tensors, len(lines))
    for row, line in enumerate(lines):
        yield line | {key: column[row] for key, column in columns.items()}


def _rollout(line: dict[str, Any]) -> Rollout:
    return Rollout(
        token_ids=line["token_ids"],
        loss_mask=line["loss_mask"],
        rollout_logprobs=line["rollout_logprobs"],
        weight_versions=line["weight_versions"],
        finish_reason=line["finish_reason"],
        text=line["response"],
        engine=line.get("engine", ""),  # absent from older recordings
        head=line["head"],
        routes=line["routes"],
    )


def _score(line: dict[str, Any]) -> Score:
    return Score(
        reward=line["reward"],
        is_formatted=line["is_formatted"],
        failure=line["failure"],
        # absent from older recordings
        group_reward=line.get("group_reward", 0.0),
        verifier_rewards=tuple(line.get("verifier_rewards", {}).items()),
    )


def _prompt(line: dict[str, Any]) -> Prompt:
    return Prompt(
        index=line["prompt_index"],
        source=line["source"],
        text=line["prompt"],
        token_ids=tuple(line["token_ids"][: line["num_prompt_tokens"]].tolist()),
        answer=line["answer"],
        metadata=line["metadata"],
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise DataError(f"{path}: expected the samples of a recorded step, got no file") from None
    lines = []
    # Not splitlines: a response may contain line separators other than \n.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: expected JSON, got {error.msg} at column {error.colno}"
            ) from error
    return lines


def _open(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    if not path.exists():
        raise DataError(f"{path}: expected the tensors of a recorded step, got no file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path}: expected a whole safetensors file, got {error}") from error


def _step_files(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := FILE_NAME.fullmatch(path.name):
            yield path, int(match[1])


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
