"""The ways a command ends early, each shown to the user as one line."""

from importlib.util import find_spec


class UserError(Exception):
    """The user's mistake: says what is wrong and what to do. Exit code 2."""

    exit_code = 2


class DamagedError(UserError):
    """A file of mlmkit's own is not what was written: says which command makes it again."""


class CheckError(Exception):
    """A check that mlmkit made for the user did not hold (parity, a tampered file). Exit code 1."""

    exit_code = 1


class EndedElsewhereError(UserError):
    """Another rank has ended the command and said why: this one has nothing to add."""


class StoppedError(Exception):
    """A signal asked a training run to stop, and it did, with its state saved. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def require(extra: str, *modules: str) -> None:
    """Raise `UserError` naming the extra to install unless every one of `modules` can be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'mlmkit[{extra}]'")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line: its first, or all of it where that announces a list."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(str(error).split()) if first.endswith(":") else first
