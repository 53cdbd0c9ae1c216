r"""Adam-G: Adam on the manifold of scale-invariant weights.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017 (arXiv 1709.09603), Algorithm 2; the
deviations are those of :mod:`flexnorm.optim.sgdg`. Adam divides every element by its own second moment, which would
turn the step out of the tangent space. Adam-G keeps one second moment per weight vector, of the length of its gradient,
so that the direction stays what it was.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from flexnorm._messages import unknown_name
from flexnorm.optim.base import Params, SphereOptimizer, check_at_least_zero, check_below_one, fused_takes
from flexnorm.optim.batches import Observe, State, Workspace, take_step
from flexnorm.optim.rows import compute_dtype
from flexnorm.optim.step import Rotation, StepOptions


class AdamG(SphereOptimizer):
    r"""Adam that keeps every weight vector of its manifold groups on the unit sphere.

    For a unit row y with clipped Riemannian gradient :math:`\hat h` (as in :class:`~flexnorm.optim.SGDG`), first moment
    :math:`\tau` (a vector per row) and second moment v (a number per row), both starting at zero:

    .. math::
        m &= \beta_1 \tau + (1 - \beta_1) \hat h, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) \hat h^\top \hat h \\
        d &= -\eta\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\, \frac{m}{\sqrt{v + \epsilon}} \\
        y &\leftarrow \exp_y(d), \qquad \tau \leftarrow \mathrm{pt}_y(m; d)

    Groups with ``manifold=False`` get AdamW, with torch's own defaults for ``betas`` and ``eps``; with
    ``off_manifold="sgd"``, as in the paper, SGD with momentum :math:`\beta_1`. A state saved when SGD was the default
    goes on with SGD.

    Args:
        params: Parameters, named parameters or param groups, as in :class:`~flexnorm.optim.SGDG`; so are all arguments
            not listed here.
        lr: Learning rate :math:`\eta`, a number or a tensor of one element. May be omitted if every group has its own.
            The paper uses 0.05 on the manifold and 0.01 elsewhere for CIFAR, with SGD there; for AdamW that is much,
            0.001 is usual.
        betas: Decay rates of the first and the second moment. None: (0.9, 0.99) on the manifold, as in the paper, and
            for SGD, (0.9, 0.999) for AdamW; a group shows what it was given.
        eps: Added to the second moment under the root (outside the manifold, AdamW adds it to the root).
        off_manifold: ``"adamw"`` or ``"sgd"``: what moves the parameters outside the manifold.
        nesterov: Nesterov momentum, for ``off_manifold="sgd"`` only.
        weight_decay: Outside the manifold only: an L2 penalty for ``"sgd"``, decoupled for ``"adamw"``; none by
            default, unlike torch's AdamW, for this group may hold biases and gains.

    All arguments but ``params`` are keys of the param groups.

    State, per parameter of the manifold: ``step``, ``exp_avg`` (of the shape of the parameter), ``exp_avg_sq``
    (``(rows,)``), float32 or float64, and ``ortho_wait`` as there. Outside: ``momentum_buffer``, or ``step``,
    ``exp_avg`` and ``exp_avg_sq``.

    Raises:
        ValueError: If an argument is out of range, or a parameter without rows (a bias, say) is put on the manifold.
    """

    _before: ClassVar[dict[str, object]] = {**SphereOptimizer._before, "off_manifold": "sgd"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        grad_clip: float | None = 0.1,
        ortho: float = 0.1,
        *,
        off_manifold: str = "adamw",
        nesterov: bool = False,
        weight_decay: float = 0.0,
        manifold: bool = True,
        maximize: bool = False,
        row_dim: int = 0,
        row_groups: int = 1,
        row_units: int = 1,
        foreach: bool | None = None,
        compile: bool = False,
        ortho_every: int = 4,
    ) -> None:
        super().__init__(params, locals())

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["off_manifold"] not in ("sgd", "adamw"):
            raise ValueError(unknown_name("off_manifold optimizer", group["off_manifold"], ["sgd", "adamw"]))
        _fill_betas(group)
        if group["nesterov"] and not group["manifold"] and group["off_manifold"] == "adamw":
            raise ValueError(
                "nesterov=True belongs to SGD, but AdamW moves this group: add off_manifold='sgd', or leave it out"
            )
        check_below_one("betas[0]", group["betas"][0])
        check_below_one("betas[1]", group["betas"][1])
        check_at_least_zero(group, "eps")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; a group without ``betas`` gets those of what moves it."""
        super().__setstate__(state)
        for group in self.param_groups:
            _fill_betas(group)

    def _prepare(self, group: dict[str, Any], params: list[Tensor], options: StepOptions) -> tuple[State, Rotation]:
        for p in params:
            if "step" not in self.state[p]:
                rows = self._put_on_sphere(p, options)
                self.state[p]["step"] = torch.tensor(0.0)
                self._fresh([p], "exp_avg")
                self.state[p]["exp_avg_sq"] = torch.zeros(rows, dtype=compute_dtype(p), device=p.device)
        exp_avgs, exp_avg_sqs, steps = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step"))
        state = State(exp_avgs if group["betas"][0] else [], exp_avg_sqs, steps)
        return state, adam_rotation(group["lr"], group["betas"], group["eps"])

    def _step_flat(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if group["off_manifold"] == "sgd":
            self._step_sgd(group, params, group["betas"][0])
            return
        for p in params:
            self.state[p].setdefault("step", torch.tensor(0.0))
        exp_avgs, exp_avg_sqs = self._fresh(params, "exp_avg"), self._fresh(params, "exp_avg_sq")
        # torch's kernels want one dtype throughout: low-precision parameters take the step in float32, rounded once.
        wide = [p if p.dtype == compute_dtype(p) else p.to(compute_dtype(p)) for p in params]
        grads = [cast(Tensor, p.grad).to(w.dtype) for p, w in zip(params, wide, strict=True)]
        # On a GPU the fused kernel wants the counters there; ours stay on the CPU, so that they never make it wait.
        fused = group["foreach"] is not False and params[0].device.type == "cpu"
        fused = fused and fused_takes(wide, grads, exp_avgs, exp_avg_sqs)
        adamw(
            wide,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            [self.state[p]["step"] for p in params],
            foreach=group["foreach"] if not (fused or isinstance(group["lr"], Tensor)) else False,
            fused=fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for p, w in zip(params, wide, strict=True):
            if w is not p:
                p.copy_(w)


def _fill_betas(group: dict[str, Any]) -> None:
    """Give a group the ``betas`` of what moves it, unless it has its own."""
    if group["betas"] is None:
        group["betas"] = (0.9, 0.999 if group["off_manifold"] == "adamw" and not group["manifold"] else 0.99)


def adam_rotation(lr: float | Tensor, betas: tuple[float, float], eps: float) -> Rotation:
    r"""The numbers of Adam-G: :math:`m = \beta_1 (\tau + r h)`; without first moment there is no :math:`\tau`."""
    beta1, beta2 = betas
    push = (1 - beta1) / beta1 if beta1 else 0.0
    return Rotation(push, -lr * (beta1 or 1.0), keep=beta1, beta1=beta1, beta2=beta2, eps=eps)


def adamg(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_clip: float | None,
    ortho: float,
    maximize: bool = False,
    row_dim: int = 0,
    row_groups: int = 1,
    row_units: int = 1,
    foreach: bool | None = None,
    compile: bool = False,
    workspace: Workspace | None = None,
    observe: Observe | None = None,
) -> None:
    """Functional form of :class:`AdamG` on the manifold: updates parameters and state in place.

    ``params``, ``grads``, ``workspace`` and ``observe`` are as for :func:`flexnorm.optim.sgdg`. ``exp_avgs`` are first
    moments, of the shapes of the weights, ``exp_avg_sqs`` second moments, ``(rows,)`` each, ``state_steps`` the steps
    taken so far, scalar tensors on the CPU, counted up here. ``lr``, ``betas``, ``eps``, ``grad_clip``, ``ortho``,
    ``maximize``, ``row_dim``, ``row_groups``, ``row_units``, ``foreach`` and ``compile`` are those of the class.
    """
    options = StepOptions(grad_clip, ortho, maximize, row_dim, row_groups, foreach, compile, row_units)
    state = State(exp_avgs if betas[0] else [], exp_avg_sqs, state_steps)
    take_step(params, grads, state, adam_rotation(lr, betas, eps), options, workspace, observe)
