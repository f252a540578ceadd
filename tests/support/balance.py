"""Deals the test files to xdist's processes, so that what is expensive to start is started once.

A process works through whole scopes, one after the other: the scopes of `FIRST`, and then each
file. Files that share a server are one scope, so that no second process starts the same server. The
longest scopes come first, so that the processes end at about the same time.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

# Folders and files by what they share. A file belongs to the first scope that names it or a folder
# above it.
FIRST = {
    "the served engine": ("tests/e2e/", "tests/test_serve.py"),
    "engines of their own": ("tests/sync/", "tests/engine/"),
    "ranks of the learner": ("tests/learner/",),
}


def scope_of(node_id: str) -> str:
    """The scope of a test: one of `FIRST`, or its file."""
    path = node_id.split("::")[0]
    for scope, beginnings in FIRST.items():
        if path.startswith(beginnings):
            return scope
    return path


def rank_of(node_id: str) -> int:
    """The place of a test's scope in the order of execution; all files outside `FIRST` are last."""
    return ([*FIRST, scope_of(node_id)]).index(scope_of(node_id))


class ByEngine(LoadScopeScheduling):
    """Whole files, and the files of a shared server together."""

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)
