"""The laboratory: claims and verdicts, running notebooks, collecting results. It knows no model.

A notebook needs two names of it, ``Paper`` and, for pictures of the reader's own, ``Picture``.
"""

from .paper import Paper
from .parameters import Picture

__all__ = ["Paper", "Picture"]
