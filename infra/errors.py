"""The two kinds of failure a command can end with."""


class UserError(Exception):
    """A mistake the user can mend: bad input, bad option, a folder that holds something else.

    The message is one line that names the file, row, key or option and what to do. The command line
    prints it without a traceback and ends with exit code 2.
    """


class RunError(Exception):
    """A failure while running that is nobody's typing mistake: a full disk, a dead cluster, a lost rank.

    The message is one line that says what failed, where, and how to go on. Exit code 1.
    """


class NoSpaceError(RunError):
    """Nothing more can be written where the work is put, so other tasks would fare no better: the command ends."""
