"""Errors that a user can put right: the command line prints them as they are, without a traceback."""

import sys


class UserError(ValueError):
    """Bad input (a recipe, a data file, an argument). The message is one or more lines that each stand alone:
    what is wrong, where (study, file, line or key), what was expected. Notes may follow (`add_note`)."""


def tell(error: UserError, what: str = "") -> None:
    """Prints the error and its notes on standard error."""
    print(f"{what}{error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
