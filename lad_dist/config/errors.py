"""Exit codes, and the errors that end a command in one line."""

# Exit codes. They tell the scheduler what to do with a job.
EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR, EXIT_NO_CHECKPOINT, EXIT_RUN_AGAIN, EXIT_NO_PROGRESS, EXIT_INTERRUPTED = (
    0,
    1,
    2,
    3,
    75,
    93,
    130,
)


class UserError(ValueError):
    """The user's mistake: one line saying where it is and what to do. Scripts print it and exit with its code."""

    code = EXIT_USER_ERROR


class Fault(Exception):
    """Not the user's mistake: one line too, and trying again, perhaps elsewhere, may help."""

    code = EXIT_FAULT
