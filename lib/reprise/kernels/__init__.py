"""The workshop of GPU kernels: CUDA C sources (``*.cu``), how to launch one, and the operations made of them.

``Kernel`` launches a CUDA C function on tensors; ``README.md`` says how to add one and what is checked without a GPU.
"""

from .adam import adam_step
from .density import parzen
from .launch import Kernel
from .normalising import batch_norm
from .warping import warp

__all__ = ["Kernel", "adam_step", "batch_norm", "parzen", "warp"]
