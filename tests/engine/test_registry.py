"""Engines that are found by their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.engine import registry
from megatron_rl.engine.address import EngineAddress
from megatron_rl.engine.registry import register, registrations, wait_for_registered
from megatron_rl.errors import EngineError


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The URLs that answer."""
    ready: set[str] = set()

    class Probe:
        def __init__(self, address: EngineAddress, timeout_seconds: float) -> None:
            self._address = address

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def is_up(self) -> bool:
            return self._address.url in ready

        def accepts_token(self) -> bool:
            return self._address.token == "right"

    monkeypatch.setattr(registry, "ReadinessProbe", Probe)
    monkeypatch.setattr(registry, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(registry, "SILENT_SECONDS", 0.2)
    return ready


def test_a_file_comes_and_goes(tmp_path: Path) -> None:
    path = register(tmp_path, "http://10.0.0.3:40001", "node 0, GPU 1")
    [found] = registrations(tmp_path)
    assert (found.url, found.place) == ("http://10.0.0.3:40001", "node 0, GPU 1")
    path.unlink()
    assert registrations(tmp_path) == []
    path.write_text('{"url": "http://')
    with pytest.raises(EngineError, match=r"40001\.json: expected the file of an engine"):
        registrations(tmp_path)


def test_a_run_waits_for_as_many_as_it_wants(ready: set[str], tmp_path: Path) -> None:
    for port in (1, 2):
        register(tmp_path, f"http://h:{port}", "")
        ready.add(f"http://h:{port}")
    register(tmp_path, "http://h:3", "")  # that of a killed process
    said: list[str] = []
    found = wait_for_registered(tmp_path, 2, "right", 5.0, said.append)
    assert [each.url for each in found] == ["http://h:1", "http://h:2"]
    assert said == []


@pytest.mark.parametrize(("url", "token"), [("http://h:9", "right"), ("http://h:1", "wrong")])
def test_a_registered_engine_that_does_not_answer(
    url: str, token: str, ready: set[str], tmp_path: Path
) -> None:
    ready.add("http://h:1")
    register(tmp_path, url, "")
    with pytest.raises(EngineError, match=rf"the engine at {url} .* to answer with the run's"):
        wait_for_registered(tmp_path, 1, token, 5.0, lambda line: None)


def test_too_few_engines_come(ready: set[str], tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(EngineError, match=r"expected 2 engines \(rollout.num_engines\) .* got 0"):
        wait_for_registered(tmp_path, 2, "right", 0.1, said.append)
    assert said == [f"waiting for 2 engines in {tmp_path}/engines, 0 are there"]
