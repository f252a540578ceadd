"""`python -m tests.weights.conversion.peak_memory ARGUMENTS`: tools/convert_checkpoint.py; the last
line is by how many bytes the process grew at most. Pages of files do not count: the system takes
them back when it needs memory.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tools import convert_checkpoint

SECONDS = 0.001


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


if __name__ == "__main__":
    before = peak = anonymous_bytes()
    has_ended = threading.Event()

    def watch() -> None:
        global peak
        while not has_ended.wait(SECONDS):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = convert_checkpoint.main(sys.argv[1:])
    has_ended.set()
    watcher.join()
    print(peak - before)
    sys.exit(code)
