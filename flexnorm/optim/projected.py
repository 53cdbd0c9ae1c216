r"""SGDP and AdamP: Euclidean relatives of the manifold optimizers, for comparison in one sweep.

They leave the length of a weight free, but take the part along the weight out of each update, so that momentum does not
make scale-invariant weights grow and thereby slow them down. Whether a weight is scale invariant is guessed in every
step from the angle between weight and gradient.

Paper: Heo et al., "AdamP: Slowing down the slowdown for momentum optimizers on scale-invariant weights", ICLR 2021
(arXiv 2006.08217). Here on the same geometry (``project``) as :class:`flexnorm.optim.SGDG`; plain loops, no fused path.

Deviation: the test of the angle is evaluated on the device, without waiting for its result.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from flexnorm.optim.base import ExactState, Params, check_at_least_zero, check_below_one
from flexnorm.optim.manifold import project, unit
from flexnorm.optim.rows import RowLayout, compute_dtype, from_rows, to_rows


def projected_update(weight: Tensor, grad: Tensor, update: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    r"""Take the part along the weight out of an update, if the weight looks scale invariant (Eq. 8 of the paper).

    .. math:: q = u - (\hat w^\top u)\,\hat w \quad\text{if}\quad
              \max_i |\cos(w_i, g_i)| < \delta / \sqrt{\dim w_i}

    tried row by row first, then for the weight as one vector. All are ``(rows, n)``; returns the update, projected or
    not, and whether it was (a boolean scalar tensor).
    """
    projected = torch.zeros((), dtype=torch.bool, device=weight.device)
    result = update
    for shape in (weight.shape, (1, weight.numel())):
        w, g, u = weight.view(shape), grad.reshape(shape), update.reshape(shape)
        cosine = (unit(w) * unit(g)).sum(1).abs().amax()
        here = (cosine < delta / w.shape[1] ** 0.5) & ~projected
        result = torch.where(here, project(unit(w), u).view(weight.shape), result)
        projected = projected | here
    return result, projected


class _Projected(ExactState):
    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_at_least_zero(group, "delta", "wd_ratio")

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if p.numel():
                self._update(group, p, cast(Tensor, p.grad))

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        raise NotImplementedError

    @staticmethod
    def _apply(group: dict[str, Any], p: Tensor, grad: Tensor, update: Tensor, size: Any, decay: float) -> None:
        """Write p <- p (1 - decay * ratio) - size * update, the update projected where p has rows."""
        ratio: Tensor | float = 1.0
        if p.ndim >= 2:
            layout = RowLayout.of(p, group["row_dim"], group["row_groups"])
            rows = to_rows(p, layout).to(compute_dtype(p))
            g, u = to_rows(grad, layout).to(rows.dtype), to_rows(update, layout)
            new, projected = projected_update(rows, g, u, group["delta"])
            update = torch.empty_like(update)
            from_rows(new, update, layout)
            ratio = 1 - projected.to(rows.dtype) * (1 - group["wd_ratio"])
        if decay:
            p.mul_(1 - decay * ratio)
        p.sub_(size * update)


class SGDP(_Projected):
    r"""SGD with momentum whose updates are projected for weights that look scale invariant.

    Args:
        params: Parameters or param groups.
        lr: Learning rate. May be omitted if every group has its own.
        momentum: Momentum.
        weight_decay: Decay rate; the weights shrink by ``lr * weight_decay / (1 - momentum)`` per step.
        delta: Threshold :math:`\delta` of the test for scale invariance.
        wd_ratio: Factor on the decay of weights that were projected.
        nesterov: Nesterov momentum.
        row_dim: As in :class:`flexnorm.optim.SGDG`.
        row_groups: As in :class:`flexnorm.optim.SGDG`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        row_dim: int = 0,
        row_groups: int = 1,
    ) -> None:
        check_below_one("momentum", momentum)
        super().__init__(params, locals())

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        momentum = group["momentum"]
        (buffer,) = self._fresh([p], "momentum_buffer")
        buffer.mul_(momentum).add_(grad)
        update = buffer * momentum + grad if group["nesterov"] else buffer
        decay = group["lr"] * group["weight_decay"] / (1 - momentum)
        self._apply(group, p, grad, update, group["lr"], decay)


class AdamP(_Projected):
    r"""AdamW whose updates are projected for weights that look scale invariant.

    Args:
        params: Parameters or param groups.
        lr: Learning rate. May be omitted if every group has its own.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay rate.
        delta: As in :class:`SGDP`, like all that follow.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        row_dim: int = 0,
        row_groups: int = 1,
    ) -> None:
        check_below_one("betas[0]", betas[0])
        check_below_one("betas[1]", betas[1])
        super().__init__(params, locals())

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        beta1, beta2 = group["betas"]
        (exp_avg,), (exp_avg_sq,) = self._fresh([p], "exp_avg"), self._fresh([p], "exp_avg_sq")
        step = self.state[p].setdefault("step", torch.tensor(0.0)).add_(1).item()
        g = grad.to(compute_dtype(p))
        exp_avg.lerp_(g, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(group["eps"])
        size = group["lr"] / (1 - beta1**step)
        self._apply(group, p, grad, exp_avg / root, size, group["lr"] * group["weight_decay"])
