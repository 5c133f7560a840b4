"""The one exception a user should ever see: a sentence that says what is wrong, where, and what would work."""


class UserError(Exception):
    """Bad input. The command line prints the message alone and exits with code 2; nothing is half-written.

    Raise it for what a user can mend (a file, a setting, a checkpoint); let programming errors keep their traceback.
    """
