"""Exit codes, and the errors that end a command in one line.

Exit codes tell a scheduler what to do with a job:

0    EXIT_DONE            the command did what it was asked to do
1    EXIT_FAULT           a fault that is not the user's: look into the log, perhaps try again elsewhere
2    EXIT_USER_ERROR      a mistake in config, data or command line: fix it, the same command fails again
3    EXIT_NO_CHECKPOINT   the run has checkpoints, none of them valid: remove the run folder to start afresh
75   EXIT_RUN_AGAIN       the run stopped early and can go on: submit the same command again
93   EXIT_NO_PROGRESS     the run died several times without a new checkpoint: do not submit it again
130  EXIT_INTERRUPTED     interrupted from the keyboard
"""

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_NO_CHECKPOINT = 3
EXIT_RUN_AGAIN = 75
EXIT_NO_PROGRESS = 93
EXIT_INTERRUPTED = 130


class UserError(ValueError):
    """A mistake of the user: one line says where it is and what to do; commands print it and exit with its code."""

    code = EXIT_USER_ERROR


class Fault(Exception):
    """A fault that is not the user's: one line too; to try again, perhaps elsewhere, may help."""

    code = EXIT_FAULT
