"""The laboratory: claims and verdicts, running notebooks, collecting results. It knows no model.

A notebook needs ``Paper``, ``published`` for figures of full-scale runs and, for files of the reader's own,
``Picture``, ``Photograph``, ``Companion`` and ``Flow``,
and ``Pixels`` for the size of one to be made; the first notebook of the course also shows ``course()``.
"""

from .exhibits import course, published
from .paper import Paper
from .parameters import Companion, Flow, Photograph, Picture, Pixels

__all__ = ["Companion", "Flow", "Paper", "Photograph", "Picture", "Pixels", "course", "published"]
