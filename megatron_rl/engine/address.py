"""Where a rollout engine listens, its route for samples, and that of health checks."""

from __future__ import annotations

from dataclasses import dataclass, field

GENERATE_ROUTE = "/inference/v1/generate"
ALIVE_ROUTE = "/megatron_rl/alive"  # answered by engine/gate.py


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAddress:
    """Where a rollout engine listens, and the run's bearer token; the token is never printed.

    Example: `EngineAddress(url="http://127.0.0.1:18400", token="...")`.
    """

    url: str
    token: str = field(repr=False)
    place: str = ""  # where it runs, for the user: "node 0, GPU 2+3"
