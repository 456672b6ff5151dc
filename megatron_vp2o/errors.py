"""Errors whose message is meant for the user: the command line prints it without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message quotes the value, the bound and the fix."""


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""
