"""What the user can mend: bad paths, bad options, bad files."""


class InputError(ValueError):
    """An input is wrong; the message says what, where, and what to do. The command line exits with code 2."""
