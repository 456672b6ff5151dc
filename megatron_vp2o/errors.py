"""Errors whose message is meant for the user: the command line prints it without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message quotes the value, the bound and the fix."""

    exit_status = 2
    """Exit status of a process that ends with this error."""


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class SyncError(UserError):
    """A rollout engine does not hold the weights that it was given."""


class RolloutError(UserError):
    """A rollout engine, or all of its servers, cannot generate."""


class DeadRunError(UserError):
    """Training went on without getting anywhere: further steps would only cost time, and starting again would not help."""

    exit_status = 3


class ControlError(DeadRunError):
    """The trust region rejected too many steps in a row."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class DataError(UserError):
    """A file of the user's data that cannot be read, or a row of it that cannot be used; names file, line and reason."""


class RewardError(UserError):
    """A reward that could not grade an answer; names the row."""


class StartError(UserError):
    """The ranks of a run did not come together."""
