"""The errors that a user can meet. Each message says what was expected, what was found, and where
to change it.
"""


class ConfigError(ValueError):
    """A setting, a model or a layout that cannot work; raised before any process is started."""


class DataError(ValueError):
    """A prompt file, a checkpoint or a rollout that is not what it claims to be."""


class EngineError(RuntimeError):
    """A rollout engine that did not start, died, or did not answer."""


class EnginesLostError(EngineError):
    """Fewer engines serve than `rollout.min_engines`; those that are started again may serve later.
    The message says what became of each.
    """


class SyncError(RuntimeError):
    """Weights did not arrive completely in a rollout engine. The engine is poisoned (it refuses to
    answer) until a later publish succeeds.
    """


class SilentEngineError(SyncError):
    """An engine answers no health checks while it is waited for in a publication."""


class SourceLostError(SyncError):
    """A learner process that sends weights has ended or does not answer; no other update can
    begin.
    """


class DivergenceError(RuntimeError):
    """A loss, a gradient norm or a log-prob that is not finite."""


class RewardError(RuntimeError):
    """No response of a step could be scored."""


class BrokenUpdateError(DivergenceError):
    """A number of an update is not finite. No rank has taken the optimizer's step: weights, moments
    and schedule are as before. Raised on every rank, with the message of the first that found it.
    """


class NothingToDo(Exception):
    """A run that is finished already. It is no failure: the command says so, with exit code 0."""
