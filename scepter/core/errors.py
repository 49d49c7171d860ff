"""The failures that end a run on purpose, each with the exit code the process answers (docs/design.md, section 9).

An error's text says what was given, what was expected and what to do; the doors print that text and no traceback.
`ConfigError` (2) lives beside the config it speaks of, in `scepter.core.config`.
"""

from __future__ import annotations


class ScepterError(Exception):
    """Base of every failure that is a message to the user, not a defect of the program."""

    exit_code: int = 1


class DataError(ScepterError):
    """The data cannot be read, found or fetched, or too much of it is bad."""

    exit_code = 3


class CheckpointError(ScepterError):
    """A checkpoint is missing, damaged, in the way, or cannot be written."""

    exit_code = 4


class PeerError(ScepterError):
    """Another rank failed, or does not answer."""

    exit_code = 5


class NonFiniteError(ScepterError):
    """The loss was not a number, too often in a row to go on."""

    exit_code = 6
