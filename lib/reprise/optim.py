"""Adam and AdaMax (Kingma & Ba 2015, arXiv 1412.6980), under the names and arguments that ``torch.optim`` uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .kernels import adam_step, on_cuda


class _Optimizer(torch.optim.Optimizer):
    """What both have in common: checked hyperparameters, the closure, and which parameters a step is for."""

    def add_param_group(self, param_group: dict) -> None:
        # Here and not in the constructor, since every group may have hyperparameters of its own.
        _check(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Returns:
            What the closure returned, or None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for p in (p for params in with_gradient for p in params):
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} moves every entry of a parameter in every step, so it takes dense "
                    f"gradients only, got one of layout {p.grad.layout} (an embedding: set sparse=False)"
                )
        for group, params in zip(self.param_groups, with_gradient, strict=True):
            self._update(group, params)
        return loss

    def _moments(self, p: Tensor, *names: str) -> list[Tensor]:
        """A parameter's state of these names, all zeros before its first step, whose number is counted up."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p)
        state["step"] += 1
        return [_real(state[name]) for name in names]


class Adam(_Optimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1): each parameter moves by the mean of its gradients over their size.

        m_t = beta1 m_{t-1} + (1 - beta1) g_t                theta_t = theta_{t-1} - lr m^_t / (sqrt(v^_t) + eps)
        v_t = beta2 v_{t-1} + (1 - beta2) g_t^2              m^_t = m_t / (1 - beta1^t),  v^_t = v_t / (1 - beta2^t)

    A drop-in for :class:`torch.optim.Adam`, whose arithmetic and state it shares: a ``state_dict`` of one can be loaded
    into the other. On CUDA tensors, where CuPy is installed, all parameters move in one launch of
    :func:`reprise.kernels.adam_step`.

    Args:
        params: parameters, or dicts with ``params`` and hyperparameters of their own.
        lr: the paper's alpha; no step is much longer than this. At least 0.
        betas: decay rates of the two moments, each at least 0 and below 1.
        eps: added to the root of the second moment, outside the root. With 0, a parameter whose gradients have all
            been zero becomes NaN.
        weight_decay: times the parameter, added to its gradient (L2 regularisation; not the decoupled decay of
            Loshchilov & Hutter 2019).
        bias_correction: divide the moments by 1 - beta^t. Without, they are too small at first (section 3), the second
            more than the first, so that the first step is (1 - beta1) / sqrt(1 - beta2) times too long.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        maximize: step up the gradient instead of down.

    Raises:
        ValueError: for a hyperparameter out of its range, in the constructor as in any group.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
    ):
        options = {"bias_correction": bias_correction, "amsgrad": amsgrad, "maximize": maximize}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options})

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)  # a state of torch.optim.Adam, which always corrects

    def _update(self, group: dict, params: list[Tensor]) -> None:
        names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"][: 3 if group["amsgrad"] else 2]
        by_kernel = []
        for p in params:
            row = _real(p), _real(p.grad), *self._moments(p, *names)
            step = int(self.state[p]["step"])
            if on_cuda.usable(p):
                by_kernel.append((step, *row))
            else:
                _adam(group, step, *row)
        if by_kernel:
            steps, thetas, grads, ms, vs, *largest = (list(column) for column in zip(*by_kernel, strict=True))
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            kept = {name: group[name] for name in ("eps", "weight_decay", "bias_correction", "amsgrad", "maximize")}
            largest = largest[0] if largest else None
            adam_step(thetas, grads, ms, vs, largest, steps, lr=lr, beta1=beta1, beta2=beta2, **kept)


def _adam(group: dict, t: int, theta: Tensor, g: Tensor, m: Tensor, v: Tensor, largest: Tensor | None = None) -> None:
    """Algorithm 1 for one parameter, its tensors changed in place."""
    beta1, beta2 = group["betas"]
    if group["maximize"]:
        g = -g
    if group["weight_decay"]:
        g = g.add(theta, alpha=group["weight_decay"])

    m.lerp_(g, 1 - beta1)  # m_t = beta1 m_{t-1} + (1 - beta1) g_t
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v_t = beta2 v_{t-1} + (1 - beta2) g_t^2
    if largest is not None:
        v = torch.maximum(largest, v, out=largest)  # AMSGrad

    # m^_t / (sqrt(v^_t) + eps), both corrections taken out of the fraction: numbers instead of passes over memory.
    # So ends section 2 of the paper; there eps stays as it is, which makes it a different one.
    correct1, correct2 = (1 - beta1**t, math.sqrt(1 - beta2**t)) if group["bias_correction"] else (1.0, 1.0)
    denominator = v.sqrt().add_(group["eps"] * correct2)
    theta.addcdiv_(m, denominator, value=-float(group["lr"]) * correct2 / correct1)


class AdaMax(_Optimizer):
    """AdaMax (Kingma & Ba 2015, Algorithm 2): Adam with the largest gradient, forgotten slowly, as its size.

        m_t = beta1 m_{t-1} + (1 - beta1) g_t
        u_t = max(beta2 u_{t-1}, |g_t|)                      theta_t = theta_{t-1} - lr / (1 - beta1^t) m_t / u_t

    As printed there is no eps: a parameter whose gradients have all been zero stays where it is
    (:class:`torch.optim.Adamax` adds one to every gradient instead).

    Args:
        params: parameters, or dicts with ``params`` and hyperparameters of their own.
        lr: the paper's alpha, at least 0.
        betas: decay rates of the mean and of the largest gradient, each at least 0 and below 1.
        maximize: step up the gradient instead of down.

    Raises:
        ValueError: for a hyperparameter out of its range, in the constructor as in any group.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        maximize: bool = False,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "maximize": maximize})

    def _update(self, group: dict, params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            m, u = self._moments(p, "exp_avg", "exp_inf")
            g, t = _real(-p.grad if group["maximize"] else p.grad), int(self.state[p]["step"])
            m.lerp_(g, 1 - beta1)  # m_t = beta1 m_{t-1} + (1 - beta1) g_t
            torch.maximum(u.mul_(beta2), g.abs(), out=u)  # u_t = max(beta2 u_{t-1}, |g_t|)
            # Where u is zero m is, too: a step of 0 / 1 instead of 0 / 0.
            _real(p).addcdiv_(m, u.masked_fill(u == 0, 1), value=-float(group["lr"]) / (1 - beta1**t))


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, which Adam moves independently; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _check(name: str, group: dict) -> None:
    """One clear error for a hyperparameter that cannot be meant."""
    for key in ("lr", "eps", "weight_decay"):
        value = group.get(key, 0.0)
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"{name}: {key} must be a finite number of at least 0, got {value}")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{name}: betas must be two numbers, each at least 0 and below 1, got {betas}")
