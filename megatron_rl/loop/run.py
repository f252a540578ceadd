"""A run put together: engines, learner, prompts, scorer, publisher and recorder, each on the ranks
that need it.

What can be wrong with the settings, the data and the checkpoint is found before a process is
started (preflight.py). Engines start first and load while the learner does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_rl.config import Config
from megatron_rl.config.file import save_config
from megatron_rl.engine.client import RolloutClient
from megatron_rl.engine.server import Engine, check_given, given_addresses
from megatron_rl.engine.start import start_engines_of
from megatron_rl.errors import ConfigError
from megatron_rl.learner.layout.parallel import (
    Parallel,
    check_world_size,
    initialize_parallel,
    shut_down_parallel,
)
from megatron_rl.learner.learner import Learner
from megatron_rl.learner.model.build import DTYPES
from megatron_rl.learner.model.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from megatron_rl.learner.update.dual import build_dual
from megatron_rl.loop.preflight import (
    check_engine_place,
    check_reference_rollouts,
    check_replay,
    checkpoint_to_resume,
    prepare_data,
    truncation_of,
)
from megatron_rl.observe.recorder import Recorder
from megatron_rl.observe.stopwatch import Stations
from megatron_rl.process.command import Progress
from megatron_rl.process.lifetime import register_cleanup
from megatron_rl.records import EngineAddress
from megatron_rl.reward.registry import resolve_verifiers
from megatron_rl.reward.score import Scorer
from megatron_rl.rollout.recording import truncate_after
from megatron_rl.sync.publish import Publisher

SYNC_LOG = "sync.jsonl"
# Until a guard has noticed its server's death; the connection breaks before.
DEATH_SECONDS = 1.0


class Run:
    """All that one rank of a training run holds; a context manager that ends what it started."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.stations = Stations(on_enter=lambda station: self.recorder.station(station))
        self.step = 0
        self.published_version = 0  # of the weights that the engines serve
        progress.describe = self._describe
        self._stack = ExitStack()
        self._engines: list[Engine] = []
        self.geometry, self.tokenizer, self.stream = prepare_data(config)
        check_world_size(config.parallel)
        self.verifiers = resolve_verifiers(config.data.tasks)
        self.is_replay = bool(config.replay)
        self.replay_dir = Path(config.replay)
        check_replay(config)
        check_engine_place(config)
        check_reference_rollouts(config)
        self._checkpoint = checkpoint_to_resume(config)

    def __enter__(self) -> Run:
        try:
            self._start()
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _start(self) -> None:
        config = self.config
        is_first = int(os.environ.get("RANK", "0")) == 0
        if is_first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.run_dir / "config.yaml")
            if not self.is_replay:
                self._start_engines()
        self.parallel = initialize_parallel(config.parallel, seed=config.loop.seed)
        # Not after an error: the other ranks would see a closed connection, and tell of that first.
        self._stack.push(lambda kind, *_: shut_down_parallel() if kind is None else None)
        self.learner = Learner(
            config.model,
            config.learner.optimizer,
            self.geometry,
            self.parallel,
            num_updates=config.loop.num_steps * config.learner.mini_batches_per_step,
            temperature=config.rollout.sampling.temperature,
            reference_path=config.objective.kl.reference,
            truncation=truncation_of(config.rollout, self.parallel.device.type),
        )
        self.dual = build_dual(config.objective.constraint)
        self.next_prompt = 0
        self._resume()
        self.recorder = self._stack.enter_context(
            Recorder(
                self.run_dir,
                rank=self.parallel.rank,
                num_steps=config.loop.num_steps,
                last_step=self.step if self.was_resumed else -1,
            )
        )
        if self.parallel.is_replica_head and not self.is_replay:
            self.scorer = self._stack.enter_context(Scorer(config.reward, self.verifiers))
        self._connect()
        self.recorder.say(f"log-probs: {self.learner.logprob_backend}")

    def _start_engines(self) -> None:
        self._engines = start_engines_of(self.config, self.run_dir)
        for engine in self._engines:
            self._stack.callback(engine.stop)
            register_cleanup(engine.stop)

    def _connect(self) -> None:
        """Wait for the engines and tell every replica's head where they are."""
        addresses: list[EngineAddress] = []
        if self.parallel.rank == 0 and not self.is_replay:
            for engine in self._engines:
                engine.wait_ready()
            addresses = [engine.address for engine in self._engines]
            given = given_addresses(self.config.rollout)
            check_given(given)
            addresses += given
        box: list[Any] = [addresses]
        dist.broadcast_object_list(box, src=0, device=self.parallel.device)
        self.addresses: Sequence[EngineAddress] = box[0]
        if self.parallel.rank == 0 and not self.is_replay:
            # Weights travel in the engine's dtype.
            self.publisher = self._stack.enter_context(
                Publisher(
                    self.addresses,
                    self.config.sync,
                    wire_dtype=DTYPES[self.config.rollout.dtype],
                )
            )
        if self.parallel.is_replica_head and not self.is_replay:
            self.client = RolloutClient(
                self.addresses, self.config.rollout, decode=self._decode, check=self.check_engines
            )

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def check_engines(self) -> None:
        """EngineError where an engine that this rank started has died."""
        for engine in self._engines:
            engine.check()

    def check_engines_after_failure(self) -> None:
        """EngineError, with its last words, where a call failed because its engine has died."""
        time.sleep(DEATH_SECONDS)
        self.check_engines()

    def _resume(self) -> None:
        """Take up where the latest checkpoint stands, if there is one and the config wants it."""
        folder = self._checkpoint
        self.was_resumed = folder is not None
        if folder is not None:
            state = load_checkpoint(folder, self.learner)
            check_same_data(state["data"], self.config, folder)
            self.step = state["step"]
            self.next_prompt = state["next_prompt"]
            self.dual.load_state_dict(state["dual"])
        if self.parallel.rank == 0 and not self.is_replay:
            truncate_after(self.run_dir / "rollouts", self.step)
            truncate_after(self.run_dir / "rollouts" / "eval", self.step)
            cut_sync_log(self.run_dir / SYNC_LOG, self.step)

    def save(self) -> None:
        """Write a checkpoint of the step that has just ended."""
        save_checkpoint(
            self.run_dir / "checkpoints",
            self.learner,
            {
                "step": self.step,
                "next_prompt": self.next_prompt,
                "dual": self.dual.state_dict(),
                "data": data_settings(self.config),
            },
            step=self.step,
            keep=self.config.checkpoint.keep,
        )

    def steps(self) -> Iterator[int]:
        """The steps that are still to do, 1 to `loop.num_steps`."""
        while self.step < self.config.loop.num_steps:
            self.step += 1
            yield self.step

    def _describe(self) -> str:
        latest = latest_checkpoint(self.run_dir / "checkpoints")
        go_on = (
            f"resume=auto goes on after {latest.name}"
            if latest
            else "no checkpoint was written yet"
        )
        return f"in step {self.step}, station {self.stations.current or 'start'}; {go_on}"

    def share(self, count: int) -> tuple[int, int]:
        """First and number of this replica's items, of `count` that all replicas share."""
        parallel: Parallel = self.parallel
        start = count * parallel.dp_rank // parallel.dp_size
        return start, count * (parallel.dp_rank + 1) // parallel.dp_size - start


def data_settings(config: Config) -> dict[str, Any]:
    """What the meaning of a prompt's index, and of its seed, depends on; plain JSON values."""
    settings = asdict(config.data) | {"sampling_seed": config.loop.seed}
    del settings["max_prompt_tokens"]
    return json.loads(json.dumps(settings))


def check_same_data(saved: dict[str, Any], config: Config, folder: Path) -> None:
    """ConfigError where a checkpoint's cursor would point into another stream of prompts."""
    present = data_settings(config)
    changed = [key for key in present if saved.get(key) != present[key]]
    if changed:
        raise ConfigError(
            f"resume: expected the data settings of {folder}, got others in data.{changed[0]}: "
            f"{saved.get(changed[0])!r} became {present[changed[0]]!r}; choose another run_dir"
        )


def cut_sync_log(path: Path, step: int) -> None:
    """Drop the updates of `step` and later ones, which are published again, and a last line that a
    killed process left torn.
    """
    if path.is_file():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        path.write_text("".join(line for line in whole if json.loads(line)["version"] < step))
