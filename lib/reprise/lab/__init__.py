"""The laboratory: claims and verdicts, running notebooks, collecting results. It knows no model.

A notebook needs ``Paper``, ``published`` for figures of full-scale runs and, for files of the reader's own,
``Picture``, ``Companion`` and ``Flow``; the first notebook of the course also shows ``course()``.
"""

from .exhibits import course, published
from .paper import Paper
from .parameters import Companion, Flow, Picture

__all__ = ["Companion", "Flow", "Paper", "Picture", "course", "published"]
