"""Where the native sources are."""

from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "megatron_rl" / "csrc"
