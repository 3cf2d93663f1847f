"""Errors that end a command. Each is shown to the user as one line."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

log = logging.getLogger(__name__)

RUST_PANIC = "PanicException"  # derives from BaseException, and cannot be imported


class UserError(Exception):
    """A mistake of the user. The message says what is wrong and what to do. Exit code 2."""

    exit_code = 2


class DamagedError(UserError):
    """A file that mlmkit wrote has changed. The message says which command writes it again."""


class CheckError(Exception):
    """A check made for the user failed (parity, a tampered file). Exit code 1."""

    exit_code = 1


class EndedElsewhereError(UserError):
    """Another rank ended the command and reported why, so this one stays silent."""


class StoppedError(Exception):
    """A signal stopped a training run, which saved its state first. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def install_hint(extra: str) -> str:
    """Return the command that installs an extra. No package index has mlmkit yet, so the command is for a clone."""
    return f"pip install '.[{extra}]' in a clone of mlmkit"


def require(extra: str, *modules: str) -> None:
    """Raise `UserError` naming the extra to install unless all `modules` are installed.

    Says so if torch is among them and not imported yet: importing it takes 2 to 10 seconds.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: {install_hint(extra)}")
    if "torch" in modules and "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        log.info("loading torch")


def first_line(error: BaseException) -> str:
    """Return a library's error message in one line: its first, or all of it if the first ends in a colon."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(str(error).split()) if first.endswith(":") else first


@contextmanager
def as_user_error(subject: object, problem: str = "cannot be loaded") -> Iterator[None]:
    """Turn any error in the block, a panic in Rust too, into a one-line `UserError` that begins with `subject`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from None
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        raise UserError(f"{subject}: {problem}: {first_line(error)}") from error
