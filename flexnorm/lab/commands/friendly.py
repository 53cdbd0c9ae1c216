"""Errors for people: one message on standard error and an exit code instead of a traceback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import typer

__all__ = ["BAD_INPUT", "FAILED", "friendly"]

BAD_INPUT, FAILED = 2, 1


@contextlib.contextmanager
def friendly() -> Iterator[None]:
    """Turn errors into one message on standard error and an exit code; with FLEXNORM_TRACEBACK=1 they pass through.

    Exit codes: 2 for input that cannot be used, 1 for a disk that takes no more, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail(130, "stopped. The same command resumes where this one ended.")
    except Exception as error:
        if os.environ.get("FLEXNORM_TRACEBACK"):
            raise
        from flexnorm.lab.run.stop import Interrupted

        if isinstance(error, Interrupted):
            _fail(error.exit_code, "stopped. What was complete is kept; the same command resumes where this one ended.")
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            reason = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
            _fail(
                FAILED,
                f"error: {reason.split('] ', 1)[-1]}. What was written before is intact: make room or rights, or "
                f"choose another --out, and run the same command again to go on.",
            )
        if (
            isinstance(error, (ValueError, TypeError, FileNotFoundError, ImportError))
            or type(error).__name__ == "BusyError"
        ):
            _fail(BAD_INPUT, f"error: {error}")
        raise


def _fail(code: int, message: str) -> None:
    """Print a message to standard error and end with an exit code."""
    typer.echo(message, err=True)
    raise typer.Exit(code)
