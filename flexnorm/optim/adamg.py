r"""Adam-G: Adam on the manifold of scale-invariant weights, with one adaptive step per weight vector.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017 (arXiv 1709.09603), Algorithm 2.

Adam divides every element by its own second moment, which would turn the step out of the tangent space. Adam-G keeps
one second moment per weight vector, of the length of its gradient, so that the direction stays what it was.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from flexnorm._messages import unknown_name
from flexnorm.optim.base import (
    Params,
    SphereOptimizer,
    check_at_least,
    check_below_one,
    fresh_state,
    fused_takes,
    put_on_sphere,
)
from flexnorm.optim.kernels import Observe, Walk, step_tile
from flexnorm.optim.manifold import (
    exp_map,
    norm_clip,
    orthogonality_gradient,
    parallel_transport,
    project,
    row_norm,
    unit,
)
from flexnorm.optim.rows import (
    Job,
    RowLayout,
    Tile,
    Workspace,
    compute_dtype,
    from_rows,
    local_part,
    local_parts,
    tiles,
    to_rows,
)
from flexnorm.optim.strips import pick, renumbered, step_natively

__all__ = ["AdamG", "adamg"]


class AdamG(SphereOptimizer):
    r"""Adam that keeps every weight vector of its manifold groups on the unit sphere.

    For a unit row y with clipped Riemannian gradient :math:`\hat h` (as in :class:`SGDG`), first moment :math:`\tau` (a
    vector per row) and second moment v (a number per row), both starting at zero:

    .. math::
        m &= \beta_1 \tau + (1 - \beta_1) \hat h, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) \hat h^\top \hat h \\
        d &= -\eta\, \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}\, \frac{m}{\sqrt{v + \epsilon}} \\
        y &\leftarrow \exp_y(d), \qquad \tau \leftarrow \mathrm{pt}_y(m; d)

    Groups with ``manifold=False`` get SGD with momentum :math:`\beta_1` (as in the paper) or AdamW.

    Args:
        params: Parameters, named parameters or param groups. :func:`flexnorm.optim.param_groups` makes the groups from
            a model. Rows of manifold groups are brought to unit length at their first step.
        lr: Learning rate :math:`\eta`, a number or a tensor of one element. May be omitted if every group has its own.
            The paper uses 0.05 on the manifold and 0.01 elsewhere (with SGD there) for CIFAR.
        betas: Decay rates of the first and the second moment.
        eps: Added to the second moment under the root (outside the manifold, AdamW adds it to the root).
        grad_clip: Bound :math:`\nu` on the Riemannian gradient of one weight vector, regularizer included; None for
            none.
        ortho: Weight :math:`\alpha` of the regularizer :math:`\frac{\alpha}{2}\lVert YY^\top - I\rVert^2` that asks the
            rows of a weight to be orthogonal.
        off_manifold: ``"sgd"`` or ``"adamw"``: what moves the parameters outside the manifold.
        nesterov: Nesterov momentum for ``off_manifold="sgd"``.
        weight_decay: Outside the manifold only: an L2 penalty for ``"sgd"``, decoupled for ``"adamw"``.
        manifold: Whether the parameters lie on the manifold; as in :class:`SGDG`, like all that follow.
        maximize: Ascend instead of descend.
        row_dim: Axis of a weight that counts its rows.
        row_groups: Number of groups of a transposed convolution, whose rows lie along both first axes.
        foreach: Move all weights together (``True``), one by one (``False``), or choose (``None``).
        compile: Compile the step.

    All arguments but ``params`` are keys of the param groups. On the manifold ``weight_decay`` and ``nesterov`` of the
    constructor are ignored.

    State, per parameter of the manifold: ``step``, ``exp_avg`` (of the shape of the parameter), ``exp_avg_sq``
    (``(rows,)``), float32 or float64. Outside: ``momentum_buffer``, or ``step``, ``exp_avg`` and ``exp_avg_sq``.

    Raises:
        ValueError: If an argument is out of range, or a parameter without rows (a bias, say) is put on the manifold.
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "grad_clip": 0.1,
        "ortho": 0.1,
        "off_manifold": "sgd",
        "nesterov": False,
        "weight_decay": 0.0,
        "manifold": True,
        "maximize": False,
        "row_dim": 0,
        "row_groups": 1,
        "foreach": None,
        "compile": False,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        grad_clip: float | None = 0.1,
        ortho: float = 0.1,
        *,
        off_manifold: str = "sgd",
        nesterov: bool = False,
        weight_decay: float = 0.0,
        manifold: bool = True,
        maximize: bool = False,
        row_dim: int = 0,
        row_groups: int = 1,
        foreach: bool | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "grad_clip": grad_clip,
                "ortho": ortho,
                "off_manifold": off_manifold,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "manifold": manifold,
                "maximize": maximize,
                "row_dim": row_dim,
                "row_groups": row_groups,
                "foreach": foreach,
                "compile": compile,
            },
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_below_one("betas[0]", group["betas"][0])
        check_below_one("betas[1]", group["betas"][1])
        check_at_least("eps", group["eps"], 0.0)
        if group["off_manifold"] not in ("sgd", "adamw"):
            raise ValueError(unknown_name("off_manifold optimizer", group["off_manifold"], ["sgd", "adamw"]))

    def _step_manifold(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if "step" not in state:
                put_on_sphere(p, group["row_dim"], group["row_groups"])
                local = local_part(p, group["row_dim"], needs_whole=False)
                rows = RowLayout.of(local, group["row_dim"], group["row_groups"]).rows
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = fresh_state(p)
                state["exp_avg_sq"] = torch.zeros(rows, dtype=compute_dtype(p), device=p.device)
        states = [self.state[p] for p in params]
        adamg(
            params,
            [cast(Tensor, p.grad) for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            grad_clip=group["grad_clip"],
            ortho=group["ortho"],
            maximize=group["maximize"],
            row_dim=group["row_dim"],
            row_groups=group["row_groups"],
            foreach=group["foreach"],
            compile=group["compile"],
            workspace=self._workspace,
            observe=self._observe(group, params),
        )

    def _step_flat(self, group: dict[str, Any], params: list[Tensor]) -> None:
        (_flat_sgd if group["off_manifold"] == "sgd" else _flat_adamw)(self, group, params)


def _flat_sgd(optimizer: AdamG, group: dict[str, Any], params: list[Tensor]) -> None:
    momentum = group["betas"][0]
    buffers: list[Tensor | None] = [None] * len(params)
    if momentum:
        for p in params:
            if "momentum_buffer" not in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = fresh_state(p)
        buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
    grads = [cast(Tensor, p.grad) for p in params]
    fused = group["foreach"] is not False and fused_takes(params, grads, buffers)
    sgd(
        params,
        grads,
        buffers,
        foreach=False if fused else group["foreach"],
        fused=fused,
        weight_decay=group["weight_decay"],
        momentum=momentum,
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"] and momentum > 0,
        maximize=group["maximize"],
    )


def _flat_adamw(optimizer: AdamG, group: dict[str, Any], params: list[Tensor]) -> None:
    for p in params:
        state = optimizer.state[p]
        if "exp_avg" not in state:
            state.update(step=torch.tensor(0.0), exp_avg=fresh_state(p), exp_avg_sq=fresh_state(p))
    states = [optimizer.state[p] for p in params]
    # torch's kernels want one dtype throughout: low-precision parameters take the step in float32 and are rounded once.
    wide = [p if p.dtype == compute_dtype(p) else p.to(compute_dtype(p)) for p in params]
    grads = [cast(Tensor, p.grad).to(w.dtype) for p, w in zip(params, wide, strict=True)]
    exp_avgs, exp_avg_sqs = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    steps = [state["step"] for state in states]
    # On a GPU the fused kernel wants the counters there; ours stay on the CPU, so that they never make it wait.
    fused = group["foreach"] is not False and params[0].device.type == "cpu"
    fused = fused and fused_takes(wide, grads, exp_avgs, exp_avg_sqs)
    adamw(
        wide,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
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


@torch.no_grad()
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
    foreach: bool | None = None,
    compile: bool = False,
    workspace: Workspace | None = None,
    observe: Observe | None = None,
) -> None:
    """Functional form of :class:`AdamG` on the manifold: updates parameters and state in place.

    Args:
        params: Weights whose rows have unit length (or any: they are taken as directions).
        grads: Their gradients, not written to.
        exp_avgs: First moments, of the shapes of the weights.
        exp_avg_sqs: Second moments, ``(rows,)`` each.
        state_steps: Steps taken so far, scalar tensors on the CPU; counted up here.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the second moment under the root.
        grad_clip: Bound on the Riemannian gradient of a row, or None.
        ortho: Weight of the orthogonality regularizer.
        maximize: Maximize the objective.
        row_dim: Axis of the output units, 0 or 1.
        row_groups: Groups of the convolution.
        foreach: False for the plain loop over parameters.
        compile: Compile the arithmetic.
        workspace: Buffers kept from step to step.
        observe: Called per parameter with its index, the angle walked and the tangent norm of its rows.
    """
    whole = ortho != 0
    params, grads = local_parts(params, row_dim, whole), local_parts(grads, row_dim, whole)
    exp_avgs = local_parts(exp_avgs, row_dim, whole)
    kernel = _single_tensor_adamg if foreach is False and not compile else _multi_tensor_adamg
    kernel(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        state_steps,
        lr=lr,
        betas=betas,
        eps=eps,
        grad_clip=grad_clip,
        ortho=ortho,
        maximize=maximize,
        row_dim=row_dim,
        row_groups=row_groups,
        compile=compile,
        workspace=workspace or Workspace(),
        observe=observe,
    )


def _correction(betas: tuple[float, float], step: float) -> float:
    """Factor that undoes the start of both moments at zero."""
    return float((1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step))


def _single_tensor_adamg(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_clip: float | None,
    ortho: float,
    maximize: bool,
    row_dim: int,
    row_groups: int,
    compile: bool,  # noqa: ARG001  one signature for all kernels
    workspace: Workspace,  # noqa: ARG001
    observe: Observe | None,
) -> None:
    beta1, beta2 = betas
    for i, (p, grad, tau, v, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)):
        step.add_(1)
        if p.numel() == 0:
            continue
        layout, dtype = RowLayout.of(p, row_dim, row_groups), compute_dtype(p)
        weight, g = to_rows(p, layout).to(dtype), to_rows(grad, layout).to(dtype)
        y = unit(weight)
        g = -g if maximize else g
        if ortho:
            g = g + orthogonality_gradient(y, ortho, row_groups)
        tangent = project(y, g)
        alive = row_norm(weight) > 0  # a pruned row stays zero, at rest
        h = torch.where(alive, norm_clip(tangent, grad_clip), 0.0)
        m = torch.where(alive, beta1 * to_rows(tau, layout) + (1 - beta1) * h, 0.0)
        v.mul_(beta2).add_(h.square().sum(1), alpha=1 - beta2)
        d = m * (-lr * _correction(betas, float(step)) / (v.unsqueeze(1) + eps).sqrt())
        from_rows(exp_map(y, d).to(p.dtype), p, layout)
        from_rows(parallel_transport(y, d, m), tau, layout)
        if observe is not None:
            observe(i, row_norm(d).squeeze(1), row_norm(tangent).squeeze(1))


def _multi_tensor_adamg(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_clip: float | None,
    ortho: float,
    maximize: bool,
    row_dim: int,
    row_groups: int,
    compile: bool,
    workspace: Workspace,
    observe: Observe | None,
) -> None:
    beta1, beta2 = betas
    push = (1 - beta1) / beta1 if beta1 else 0.0
    if not compile:
        left = step_natively(
            (params, grads, exp_avgs if beta1 else (), exp_avg_sqs, steps),
            Walk(grad_clip, push, -lr * (beta1 or 1.0), keep=beta1, beta1=beta1, beta2=beta2, eps=eps),
            ortho=ortho,
            maximize=maximize,
            row_dim=row_dim,
            row_groups=row_groups,
            workspace=workspace,
            observe=observe,
        )
        params, grads, steps = pick(params, left), pick(grads, left), pick(steps, left)
        exp_avgs, exp_avg_sqs = pick(exp_avgs, left), pick(exp_avg_sqs, left)
        observe = renumbered(observe, left)
    if not params:
        return
    torch._foreach_add_(steps, 1)
    counts = [float(step) for step in steps]

    def make() -> list[Tile]:
        layouts = [RowLayout.of(p, row_dim, row_groups) for p in params]
        moments = exp_avgs if beta1 else [None] * len(params)
        parts = zip(layouts, params, moments, exp_avg_sqs, ages, strict=True)
        return tiles([Job(i, *job) for i, job in enumerate(parts)], whole_blocks=ortho != 0)

    # Parameters that missed the same steps stay together; only differences in age matter to who is in a tile.
    ages = [counts[0] - count for count in counts]
    addresses = [t.data_ptr() for t in (*params, *exp_avgs, *exp_avg_sqs)]
    for tile in workspace.plan((row_dim, row_groups, ortho != 0, beta1 != 0, *ages, *addresses), make):
        scale = -lr * _correction(betas, counts[tile.jobs[0].index]) * (beta1 or 1.0)
        walk = Walk(grad_clip, push=push, scale=scale, keep=beta1, beta2=beta2, eps=eps)
        tile.load(grads, workspace)
        step_tile(tile, walk, ortho, maximize, compile, workspace, observe)
