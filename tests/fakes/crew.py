"""The engines of a run without engines: what `loop/publish.py` asks of a `Crew`."""

from __future__ import annotations

from collections.abc import Sequence


class FakeCrew:
    """Engines that take part in publications; `lost` are left out after the next failure.

    Example: `FakeCrew("http://one", "http://two", lost=("http://two",))`.
    """

    def __init__(self, *urls: str, lost: Sequence[str] = ()) -> None:
        self.urls, self.lost = urls or ("http://one",), tuple(lost)
        self.log: list[str] = []
        self.shortage = ""  # of another rank
        self._chosen = self.urls

    def agree(self, shortage: str = "") -> str:
        self.log.append("agree")
        return shortage or self.shortage

    def gather(self) -> tuple[tuple[str, ...], bool]:
        self.log.append("gather")
        has_changed, self._chosen = self._chosen != self.urls, self.urls
        return self.urls, has_changed

    def take_in(self, urls: Sequence[str]) -> None:
        self.log.append(f"take in {len(urls)}")

    def examine(self, urls: Sequence[str]) -> bool:
        self.log.append("examine")
        lost, self.lost = self.lost, ()
        self.urls = tuple(url for url in self.urls if url not in lost)
        return bool(lost)
