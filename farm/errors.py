"""Exceptions that become one sentence."""


class UserError(Exception):
    """A mistake of the user's, told in one sentence that names the file, the key and the fix.

    The command line prints the sentence without a traceback and exits with status 2.
    """


class StoreError(UserError):
    """The store is full, away for too long, or may not be used: nothing can go on, and no concept is to blame."""


class IntegrityError(UserError):
    """The store holds something else than was put there; the sentence says what, where, and what to do."""


def brief(error: Exception, most: int = 200) -> str:
    """Another library's error inside of a sentence: its first line, without the final full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:most]
