"""What a user can mend is a `UserError`: one line on stderr, exit code 2, no traceback."""


class UserError(Exception):
    """A failure whose message says, in one line, what is wrong and what to do about it."""
