"""The result of one check of a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor.

    Example: `Finding(name="shm", verdict="FAIL", text="/dev/shm: 64 MiB free: expected 1,024 for
    NCCL and vLLM; enlarge it (docker run --shm-size 16g)")`.
    """

    name: str
    verdict: Verdict  # FAIL: the run will not work; warn: it may not, or not well
    text: str

    def __str__(self) -> str:
        """As it is printed."""
        return f"{self.verdict:4s}  {self.name:12s}  {self.text}"


def passed(name: str, text: str) -> Finding:
    """A check that found nothing wrong."""
    return Finding(name=name, verdict="ok", text=text)


def warned(name: str, text: str) -> Finding:
    """A check that found something that may be wrong."""
    return Finding(name=name, verdict="warn", text=text)


def failed(name: str, text: str) -> Finding:
    """A check that found something with which the run will not work."""
    return Finding(name=name, verdict="FAIL", text=text)
