"""Settings of experiment trackers, to which a run sends its metrics besides TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rl.config.choices import TRACKERS, TrackingMode
from megatron_rl.config.rules import literal_choices, one_of, require


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Which trackers a run writes, and under which names."""

    # modules of observe/trackers/; each needs the optional extra of its name
    trackers: list[str] = field(default_factory=list)
    project: str = "megatron_rl"
    name: str = ""  # of the run; "": that of run_dir
    # offline: files below <run_dir>/trackers/, nothing is sent; online: the server that the
    # tracker's own environment variables name
    mode: TrackingMode = "offline"

    def __post_init__(self) -> None:
        literal_choices(self)
        for name in self.trackers:
            one_of("trackers", name, TRACKERS)
        require(
            len(set(self.trackers)) == len(self.trackers),
            f"trackers: expected each one once, got {', '.join(self.trackers)}",
        )
        require(bool(self.project), "project: expected a name, got an empty text")
