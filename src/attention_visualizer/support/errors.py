"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake in what was asked for or given: one line that says what is wrong and what to do.

    The entry points print it without a traceback and exit with a non-zero code.
    """
