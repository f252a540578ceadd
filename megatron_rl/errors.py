"""The errors that a user can meet. Each message says what was expected, what came, and where to
change it.
"""


class ConfigError(ValueError):
    """A setting, a model or a layout that cannot work; raised before any process is started."""


class DataError(ValueError):
    """A prompt file, a checkpoint or a rollout that is not what it claims to be."""


class EngineError(RuntimeError):
    """A rollout engine that did not start, died, or did not answer."""


class SyncError(RuntimeError):
    """Weights that did not arrive whole in a rollout engine; the engine is poisoned until published
    to again.
    """


class DivergenceError(RuntimeError):
    """A loss, a gradient norm or a log-prob that is not finite."""
