"""One clear line for whatever goes wrong, and the exit code that goes with it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from placement.explain import explain_infeasible
from placement.planner import Infeasible
from placement.policy import PolicyError
from security.errors import SecurityError
from serving.errors import CommandError

FAILURE = 1
BAD_INPUT = 2
INTERRUPTED = 130


def report_errors(run: Callable[[], int], debug: bool) -> int:
    """Runs a command; an error becomes a message on standard error and an exit code.

    Args:
        run: the command; returns its exit code.
        debug: whether to show tracebacks too.
    """
    try:
        return run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does.
        sys.stderr.close()
        return FAILURE
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = _verdict(error)
        print(f"bulkhead: {message}", file=sys.stderr)
        return code


def _verdict(error: Exception) -> tuple[int, str]:
    match error:
        case CommandError():
            return error.exit_code, str(error)
        case Infeasible():
            return FAILURE, explain_infeasible(error)
        case PolicyError():
            return BAD_INPUT, str(error)
        case SecurityError():
            return FAILURE, f"{error.code}: {error}"
        case _:
            lines = str(error).strip().splitlines()
            first = lines[0][:500] if lines else "no more is known"
            return FAILURE, f"{type(error).__name__}: {first} (--debug shows where)"
