"""``adam_step``: one step of Adam for all parameters of a list, on the kernel of ``adam.cu``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .launch import Kernel

_SOURCE = Path(__file__).with_name("adam.cu").read_text(encoding="utf-8")
# The table has to fit into the 4 KiB that every CUDA version passes to a kernel, also with doubles in it.
_TENSORS, _CHUNK, _THREADS = 56, 4096, 256
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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
    with torch.no_grad():
        _adam_step(*lists, numbers, lr, beta1, beta2, eps, weight_decay, bias_correction, maximize)


def _check(lists: list[list[Tensor]], steps: list[int], amsgrad: bool) -> None:
    count = len(lists[0])
    lengths = [len(tensors) for tensors in lists[: 5 if amsgrad else 4]] + [len(steps)]
    if set(lengths) != {count}:
        raise ValueError(f"adam_step takes lists of one length, got {lengths} (parameters, gradients, moments…, steps)")
    if min(steps, default=1) < 1:
        raise ValueError(f"adam_step counts steps from 1, got {min(steps)}")
    for place, row in enumerate(zip(*lists[: 5 if amsgrad else 4], strict=True)):
        facts = [(tuple(t.shape), t.dtype, t.device) for t in row]
        if len(set(facts)) > 1:
            shown = "; ".join(f"{shape} {dtype} {device}" for shape, dtype, device in facts)
            raise ValueError(f"adam_step: parameter {place}, its gradient and moments differ: {shown}")
        if row[0].dtype not in _FLOATS or any(t.layout != torch.strided for t in row):
            raise ValueError(f"adam_step: parameter {place} must be dense and of floating dtype, got {row[0].dtype}")


_CHANGED = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")


@torch.library.custom_op("reprise::adam_step", mutates_args=_CHANGED)
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
    rows = list(zip(params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else []), strict=True))
    groups: dict[tuple, list[tuple[int, list[Tensor]]]] = {}
    copied = []
    for row, step in zip(rows, steps, strict=True):
        alike = _alike(row)
        copied += [pair for place, pair in enumerate(zip(row, alike, strict=True)) if place != 1]
        if row[0].numel():
            groups.setdefault((row[0].device, row[0].dtype), []).append((step, alike))
    for (device, dtype), found in groups.items():
        real = np.float64 if dtype == torch.float64 else np.float32
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, -1.0 if maximize else 1.0)
        for begin in range(0, len(found), _TENSORS):
            table, blocks = _table(found[begin : begin + _TENSORS], real, lr, beta1, beta2, bias_correction)
            _kernel(dtype)(blocks, _THREADS, table, *numbers, device=device)
    for original, used in copied:
        if used is not original:
            original.copy_(used)


@_adam_step.register_fake
def _(*arguments) -> None:
    return None


def _alike(row: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors of one parameter, or copies, so that a place in memory means the same element in each of them."""
    order = sorted(range(row[0].dim()), key=row[0].stride, reverse=True)
    if row[0].permute(order).is_contiguous() and all(t.stride() == row[0].stride() for t in row):
        return list(row)
    return [t.contiguous() for t in row]


def _table(
    found: list[tuple[int, list[Tensor]]], real: type, lr: float, beta1: float, beta2: float, bias_correction: bool
) -> tuple[np.ndarray, int]:
    """The kernel's struct Table, filled, and the number of blocks."""
    table, blocks = np.zeros(1, _layout(real)), 0
    entry = table[0]
    for place, (step, row) in enumerate(found):
        for name, tensor in zip(_POINTERS, row, strict=False):  # without amsgrad the last one stays null
            entry[name][place] = tensor.data_ptr()
        entry["size"][place] = row[0].numel()
        entry["step_size"][place] = lr / (1 - beta1**step) if bias_correction else lr
        entry["correction"][place] = (1 - beta2**step) ** -0.5 if bias_correction else 1.0
        entry["first_block"][place] = blocks
        blocks += -(-row[0].numel() // _CHUNK)
    entry["first_block"][len(found) :] = blocks
    return table, blocks


@functools.cache
def _layout(real: type) -> np.dtype:
    fields = [(name, np.uint64, _TENSORS) for name in _POINTERS]
    fields += [("size", np.int64, _TENSORS), ("step_size", real, _TENSORS), ("correction", real, _TENSORS)]
    return np.dtype([*fields, ("first_block", np.int32, _TENSORS)], align=True)


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return Kernel(_SOURCE, "adam_step", file="adam.cu", SCALAR=dtype, REAL=real, TENSORS=_TENSORS, CHUNK=_CHUNK)
