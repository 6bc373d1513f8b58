"""UserError, and the text of other errors in one line."""


class UserError(ValueError):
    """A mistake in what was asked for or given: one line that says what is wrong and what to do.

    The entry points print it without a traceback and exit with a non-zero code.
    """


def summary(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or the name of its type if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """Return an error's whole message in one line, or the name of its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
