"""What a command reports instead of a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """A command failed; the text says what was expected, what was found, what to do.

    Attributes:
        exit_code: 1 for a failure.
    """

    exit_code = 1


class UsageError(CommandError):
    """The input is at fault: an option, a path, a policy, a model. Exit code 2."""

    exit_code = 2
