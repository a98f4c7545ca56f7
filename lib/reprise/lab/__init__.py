"""The laboratory: claims and verdicts, running notebooks, collecting results. It knows no model.

A notebook needs ``Paper``, ``published`` for figures of full-scale runs and, for pictures of the reader's own,
``Picture``; the first notebook of the course also shows ``course()``.
"""

from .exhibits import course, published
from .paper import Paper
from .parameters import Picture

__all__ = ["Paper", "Picture", "course", "published"]
