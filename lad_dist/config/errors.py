"""Exit codes, which tell a scheduler what to do with a job, and the errors that end a command in one line."""

EXIT_DONE = 0
EXIT_FAULT = 1  # not the user's: look into the log, perhaps try again elsewhere
EXIT_USER_ERROR = 2  # a mistake in config, data or command line: fix it, the same command fails again
EXIT_NO_CHECKPOINT = 3  # the run has checkpoints, none of them valid: remove the run folder to start afresh
EXIT_RUN_AGAIN = 75  # the run stopped early and can go on: submit the same command again
EXIT_NO_PROGRESS = 93  # the run died several times without a new checkpoint: do not submit it again
EXIT_INTERRUPTED = 130  # from the keyboard


class UserError(ValueError):
    """A mistake of the user: one line says where it is and what to do; commands print it and exit with its code."""

    code = EXIT_USER_ERROR


class Fault(Exception):
    """A fault that is not the user's: one line too; to try again, perhaps elsewhere, may help."""

    code = EXIT_FAULT
