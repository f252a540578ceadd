"""Engines that return the experts of their tokens are told from those that do not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.engine.server import check_returned_routes
from megatron_rl.errors import EngineError
from tests.fakes.http_server import FakeServer


def answer(**more: Any) -> tuple[int, dict[str, Any]]:
    return 200, {"choices": [{"index": 0, "token_ids": [5], **more}]}


@pytest.mark.parametrize(
    ("status_and_body", "is_sound"),
    [
        (answer(routed_experts="k05VTVBZ"), True),
        (answer(routed_experts=None), False),
        (answer(), False),
        ((400, {"error": "no"}), False),
    ],
)
def test_an_engine_is_asked_once(status_and_body: Any, is_sound: bool) -> None:
    server = FakeServer(status_and_body)
    try:
        if is_sound:
            check_returned_routes([server.address])
        else:
            with pytest.raises(EngineError) as caught:
                check_returned_routes([server.address])
            message = str(caught.value)
            assert server.address.url in message
            assert "--enable-return-routed-experts" in message
            assert "\n" not in message
    finally:
        server.close()
    assert len(server.requests) == 1
    assert server.requests[0]["sampling_params"]["max_tokens"] == 1
