"""Errors that a user can put right: the command line prints them as they are, without a traceback."""


class UserError(ValueError):
    """Bad input (a recipe, a data file, an argument). The message is one or more lines that each stand alone:
    what is wrong, where (study, file, line or key), what was expected."""
