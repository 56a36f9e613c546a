"""What ends a command with one message and no traceback."""


class CommandError(Exception):
    """An error of a sub-command that the user can mend, whatever part of the package has found it."""
