"""The one exception a user's mistake becomes."""


class UserError(Exception):
    """A mistake of the user's, told in one sentence that names the file, the key and the fix.

    The command line prints the sentence without a traceback and exits with status 2.
    """
