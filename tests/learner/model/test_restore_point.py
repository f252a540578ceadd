"""Updates that are taken back, in every layout, with float32 and bfloat16 and with both optimizers:
weights, moments, step counts and schedule come back as the same bits, and the run goes on as if the
update had never been. What the ranks do stands in edge_ranks.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.learner.model.restore_point import RestorePoint
from tests.learner.support.edge_ranks import RESTORED, WITH_RESTORE

NAMES = [
    f"restored.{layout}.{dtype}.{optimizer}"
    for layout in WITH_RESTORE
    for is_distributed, optimizer in ((False, "plain"), (True, "distributed"))
    for dtype in RESTORED[is_distributed]
]


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_taken_back_to_the_last_bit(
    name: str, edge_outcomes: dict[str, list[Any]]
) -> None:
    for of_rank in edge_outcomes[name]:
        for found in of_rank:
            assert found == dict.fromkeys(
                ("has_moved", "is_back", "goes_on", "reports_the_same"), True
            )


def test_nothing_is_restored_before_something_was_copied() -> None:
    with pytest.raises(ValueError, match="nothing has been copied yet"):
        RestorePoint(None).restore()  # type: ignore[arg-type]
