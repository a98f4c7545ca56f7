"""``adam_step``: one step of Adam for all parameters of a list, on the kernel of ``adam.cu``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .launch import FLOATS, Kernel, real_dtype

_SOURCE = Path(__file__).with_name("adam.cu").read_text(encoding="utf-8")
# The table has to fit into the 4 KiB that every CUDA version passes to a kernel, also with doubles in it.
_TENSORS, _CHUNK, _THREADS = 56, 4096, 256
_POINTERS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] | None,
    steps: int | Sequence[int],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    amsgrad: bool = False,
    maximize: bool = False,
) -> None:
    """Update parameters and their moments in place, in as few launches as there are 56 tensors in the list.

    Kingma & Ba 2015 (arXiv 1412.6980), Algorithm 1, with the options of :class:`torch.optim.Adam` and its order of
    operations: weight decay is added to the gradient (L2), eps to the corrected root.

    Args:
        params: tensors of any shape, device and memory layout, of floating dtype.
        grads: their gradients, of the same shapes, dtypes and devices; as all that follow.
        exp_avgs: first moments m, updated.
        exp_avg_sqs: second moments v, updated.
        max_exp_avg_sqs: the largest v so far, updated; needed with ``amsgrad`` only.
        steps: the number t of this step, 1 for the first: of all tensors, or one for each.
        lr: the paper's alpha.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: times the parameter, added to its gradient.
        bias_correction: divide the moments by 1 - beta^t, as the paper does; without, they start near zero.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        maximize: step up the gradient.

    Raises:
        ValueError: when lists or tensors do not fit each other, or a step is below 1; the message shows which.
    """
    lists = [list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs or [])]
    if not amsgrad:
        lists[4] = []
    numbers = [steps] * len(lists[0]) if isinstance(steps, int) else [int(step) for step in steps]
    _check(lists, numbers, amsgrad)
    arguments = (*lists, numbers, lr, beta1, beta2, eps, weight_decay, bias_correction, maximize)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            torch.ops.reprise.adam_step(*arguments)
            return
        # Past the operator, whose bookkeeping for hundreds of tensors would take longer than the kernel; autograd has
        # to know all the same that they changed.
        _adam_step(*arguments)
        torch.autograd.graph.increment_version([t for place in (0, 2, 3, 4) for t in lists[place]])


def _check(lists: list[list[Tensor]], steps: list[int], amsgrad: bool) -> None:
    count, given = len(lists[0]), lists[: 5 if amsgrad else 4]
    lengths = [len(tensors) for tensors in given] + [len(steps)]
    if set(lengths) != {count}:
        raise ValueError(f"adam_step takes lists of one length, got {lengths} (parameters, gradients, moments…, steps)")
    if min(steps, default=1) < 1:
        raise ValueError(f"adam_step counts steps from 1, got {min(steps)}")
    # List by list, since hundreds of small tensors are looked at in every step.
    facts = [[(t.shape, t.dtype, t.device, t.layout) for t in tensors] for tensors in given]
    if any(other != facts[0] for other in facts[1:]):
        place, row = next((place, row) for place, row in enumerate(zip(*facts, strict=True)) if len(set(row)) > 1)
        shown = "; ".join(f"{tuple(shape)} {dtype} {device}" for shape, dtype, device, _ in row)
        raise ValueError(f"adam_step: parameter {place}, its gradient and moments differ: {shown}")
    for place, (_, dtype, _, layout) in enumerate(facts[0]):
        if dtype not in FLOATS or layout != torch.strided:
            raise ValueError(f"adam_step: parameter {place} must be dense and of floating dtype, got {layout} {dtype}")


def _adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    maximize: bool,
) -> None:
    groups: dict[tuple, list[tuple[int, tuple[Tensor, ...]]]] = {}
    copied = []
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else [])]
    for row, step in zip(zip(*lists, strict=True), steps, strict=True):
        alike = _alike(row)
        if alike is not row:
            copied += [(row[place], alike[place]) for place in range(len(row)) if place != 1]
        if row[0].numel():
            groups.setdefault((row[0].device, row[0].dtype), []).append((step, alike))
    for (device, dtype), found in groups.items():
        real = np.float64 if dtype == torch.float64 else np.float32
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, -1.0 if maximize else 1.0)
        for begin in range(0, len(found), _TENSORS):
            table, blocks = _table(found[begin : begin + _TENSORS], real, lr, beta1, beta2, bias_correction)
            _kernel(dtype)(blocks, _THREADS, table, *numbers, device=device)
    for original, used in copied:
        original.copy_(used)


_OPERATOR = torch.library.custom_op(
    "reprise::adam_step", _adam_step, mutates_args=("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
)
_OPERATOR.register_fake(lambda *arguments: None)


def _alike(row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of one parameter, or copies, so that a place in memory means the same element in each of them."""
    if all(t.is_contiguous() for t in row):
        return row
    order = sorted(range(row[0].dim()), key=row[0].stride, reverse=True)
    if row[0].permute(order).is_contiguous() and all(t.stride() == row[0].stride() for t in row):
        return row
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in row)


def _table(
    found: list[tuple[int, tuple[Tensor, ...]]], real: type, lr: float, beta1: float, beta2: float, correct: bool
) -> tuple[np.ndarray, int]:
    """The kernel's struct Table, filled, and the number of blocks."""
    table, count = np.zeros(1, _layout(real)), len(found)
    steps, rows = zip(*found, strict=True)
    for name, tensors in zip(_POINTERS, zip(*rows, strict=True), strict=False):  # the last stays null without amsgrad
        table[name][0, :count] = [t.data_ptr() for t in tensors]
    sizes = np.array([row[0].numel() for row in rows], np.int64)
    table["size"][0, :count] = sizes
    table["step_size"][0, :count] = [lr / (1 - beta1**step) if correct else lr for step in steps]
    table["correction"][0, :count] = [(1 - beta2**step) ** -0.5 if correct else 1.0 for step in steps]
    ends = np.cumsum(-(-sizes // _CHUNK))
    table["first_block"][0, 1:count] = ends[:-1]
    table["first_block"][0, count:] = ends[-1]
    return table, int(ends[-1])


@functools.cache
def _layout(real: type) -> np.dtype:
    fields = [(name, np.uint64, _TENSORS) for name in _POINTERS]
    fields += [("size", np.int64, _TENSORS), ("step_size", real, _TENSORS), ("correction", real, _TENSORS)]
    return np.dtype([*fields, ("first_block", np.int32, _TENSORS)], align=True)


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    types = {"SCALAR": dtype, "REAL": real_dtype(dtype)}
    return Kernel(_SOURCE, "adam_step", file="adam.cu", **types, TENSORS=_TENSORS, CHUNK=_CHUNK)
