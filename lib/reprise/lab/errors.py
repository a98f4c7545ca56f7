"""The two ways a run can go wrong, kept apart because the reader must do different things about them."""


class BadInput(Exception):
    """Something the caller asked for or wrote down is wrong. One line that says what to do; exit status 2."""


class NotebookFailed(Exception):
    """A notebook did not reach its end. Carries one line for the closing table; exit status 3."""
