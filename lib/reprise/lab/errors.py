"""What the laboratory tells apart when something goes wrong."""


class BadInput(Exception):
    """Something the caller asked for or wrote down is wrong. One line that says what to do; exit status 2."""


# The exit status of a notebook's process that could not write to its folder; sysexits.h has it for input and output.
CANNOT_WRITE = 74
