"""The laboratory: claims and verdicts, running notebooks, collecting results. It knows no model.

A notebook needs two names of it, ``Paper`` and, for pictures of the reader's own, ``Picture``; the first notebook
of the course also shows ``course()``.
"""

from .doctor import course
from .paper import Paper
from .parameters import Picture

__all__ = ["Paper", "Picture", "course"]
