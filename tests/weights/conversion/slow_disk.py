"""`python -m tests.weights.conversion.slow_disk ARGUMENTS`: tools/convert_checkpoint.py on a disk
that takes a tenth of a second to sync a file, so that it can be killed between two files.
"""

from __future__ import annotations

import os
import sys
import time

from tools import convert_checkpoint

if __name__ == "__main__":
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.1)
        sync(descriptor)

    os.fsync = slow
    sys.exit(convert_checkpoint.main(sys.argv[1:]))
