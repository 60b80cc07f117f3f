"""The one exception that means: the input is wrong, here is why, nothing was changed."""


class InputError(ValueError):
    """Wrong input from the user; the command line prints its message on one line and exits with code 2."""
