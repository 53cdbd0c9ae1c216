r"""SGD-G: stochastic gradient descent with momentum on the manifold of scale-invariant weights.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017 (arXiv 1709.09603), Algorithm 1.

Deviations from the paper's own code: constructor arguments reach the groups (there ``omega`` was ignored); ``p.grad``
is not edited; the state survives changes of the learning rate; parameters of any dtype and memory format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from flexnorm.optim.base import Params, SphereOptimizer, check_below_one, fresh_state, fused_takes, put_on_sphere
from flexnorm.optim.kernels import Observe, Walk, step_tile
from flexnorm.optim.manifold import exp_map, norm_clip, orthogonality_gradient, project, row_norm, transport_along, unit
from flexnorm.optim.rows import Job, RowLayout, Tile, Workspace, compute_dtype, from_rows, local_parts, tiles, to_rows
from flexnorm.optim.strips import pick, renumbered, step_natively

__all__ = ["SGDG", "sgdg"]


class SGDG(SphereOptimizer):
    r"""Momentum SGD that keeps every weight vector of its manifold groups on the unit sphere.

    For a unit row y with gradient g of loss plus regularizer, and momentum :math:`\tau`, starting at zero:

    .. math::
        h &= g - (y^\top g)\,y, \qquad \hat h = h \min(1, \nu / \lVert h \rVert) \\
        d &= \gamma \tau - \eta \hat h \\
        y &\leftarrow \exp_y(d), \qquad \tau \leftarrow \mathrm{pt}_y(d; d)

    In groups with ``manifold=False`` it is SGD with momentum, Nesterov momentum and weight decay as in torch.

    Args:
        params: Parameters, named parameters or param groups. :func:`flexnorm.optim.param_groups` makes the groups from
            a model. Rows of manifold groups are brought to unit length at their first step.
        lr: Learning rate :math:`\eta`, a number or a tensor of one element. May be omitted if every group has its own.
            The paper uses 0.2 on the manifold and 0.01 elsewhere for CIFAR.
        momentum: Momentum :math:`\gamma`.
        grad_clip: Bound :math:`\nu` on the Riemannian gradient of one weight vector, regularizer included; None for
            none.
        ortho: Weight :math:`\alpha` of the regularizer :math:`\frac{\alpha}{2}\lVert YY^\top - I\rVert^2` that asks the
            rows of a weight to be orthogonal.
        nesterov: Nesterov momentum; outside the manifold only, the paper has none on it.
        weight_decay: L2 penalty; outside the manifold only.
        manifold: Whether groups that do not say are on the manifold.
        maximize: Maximize the objective (the regularizer is still minimized).
        row_dim: Axis of the output units: 0, or 1 for transposed convolutions.
        row_groups: Groups of a grouped convolution; ``ortho`` does not compare rows of different groups.
        foreach: Work on many parameters at once (None and True), on the CPU in a compiled kernel where there is a C
            compiler; or on one after the other (False, slow and plain).
        compile: Compile the arithmetic of the manifold step with TorchInductor.

    All arguments but ``params`` are keys of the param groups. On the manifold ``weight_decay`` and ``nesterov`` of the
    constructor are ignored.

    State, per parameter: ``momentum_buffer``, of the shape of the parameter, float32 (float64 for float64 parameters).

    Raises:
        ValueError: If an argument is out of range, or a parameter without rows (a bias, say) is put on the manifold.

    Examples:
        >>> weight = torch.nn.Parameter(torch.randn(4, 9))
        >>> optimizer = SGDG([weight], lr=0.2)
        >>> weight[:, 0].sum().backward()
        >>> optimizer.step()
        >>> bool(torch.allclose(weight.norm(dim=1), torch.ones(4)))
        True
    """

    _group_defaults: ClassVar[dict[str, Any]] = {
        "momentum": 0.9,
        "grad_clip": 0.1,
        "ortho": 0.1,
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
        momentum: float = 0.9,
        grad_clip: float | None = 0.1,
        ortho: float = 0.1,
        *,
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
                "momentum": momentum,
                "grad_clip": grad_clip,
                "ortho": ortho,
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
        check_below_one("momentum", group["momentum"])
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov=True needs a momentum above 0")

    def _buffers(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor | None]:
        if group["momentum"] == 0:
            return [None] * len(params)
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = fresh_state(p)
        return [self.state[p]["momentum_buffer"] for p in params]

    def _step_manifold(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if "on_sphere" not in self.state[p]:
                put_on_sphere(p, group["row_dim"], group["row_groups"])
                self.state[p]["on_sphere"] = True
        sgdg(
            params,
            [cast(Tensor, p.grad) for p in params],
            self._buffers(group, params),
            lr=group["lr"],
            momentum=group["momentum"],
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
        grads, buffers = [cast(Tensor, p.grad) for p in params], self._buffers(group, params)
        fused = group["foreach"] is not False and fused_takes(params, grads, buffers)
        sgd(
            params,
            grads,
            buffers,
            foreach=False if fused else group["foreach"],
            fused=fused,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )


@torch.no_grad()
def sgdg(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
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
    """Functional form of :class:`SGDG` on the manifold: updates ``params`` and ``momentum_buffers`` in place.

    Args:
        params: Weights whose rows have unit length (or any: they are taken as directions).
        grads: Their gradients, not written to.
        momentum_buffers: Tangent vectors of the shapes of the weights, or None where ``momentum`` is 0.
        lr: Learning rate.
        momentum: Momentum.
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
    buffers = local_parts([b for b in momentum_buffers if b is not None], row_dim, whole)
    kernel = _single_tensor_sgdg if foreach is False and not compile else _multi_tensor_sgdg
    kernel(
        params,
        grads,
        buffers,
        lr=lr,
        momentum=momentum,
        grad_clip=grad_clip,
        ortho=ortho,
        maximize=maximize,
        row_dim=row_dim,
        row_groups=row_groups,
        compile=compile,
        workspace=workspace or Workspace(),
        observe=observe,
    )


def _single_tensor_sgdg(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    grad_clip: float | None,
    ortho: float,
    maximize: bool,
    row_dim: int,
    row_groups: int,
    compile: bool,  # noqa: ARG001  one signature for all kernels
    workspace: Workspace,  # noqa: ARG001
    observe: Observe | None,
) -> None:
    for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
        if p.numel() == 0:
            continue
        layout, dtype = RowLayout.of(p, row_dim, row_groups), compute_dtype(p)
        weight, g = to_rows(p, layout).to(dtype), to_rows(grad, layout).to(dtype)
        y = unit(weight)
        g = -g if maximize else g
        if ortho:
            g = g + orthogonality_gradient(y, ortho, row_groups)
        tangent = project(y, g)
        d = -lr * norm_clip(tangent, grad_clip)
        if momentum:
            d = momentum * to_rows(buffers[i], layout) + d
        d = torch.where(row_norm(weight) > 0, d, 0.0)  # a pruned row stays zero, at rest
        from_rows(exp_map(y, d).to(p.dtype), p, layout)
        if momentum:
            from_rows(transport_along(y, d), buffers[i], layout)
        if observe is not None:
            observe(i, row_norm(d).squeeze(1), row_norm(tangent).squeeze(1))


def _multi_tensor_sgdg(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    grad_clip: float | None,
    ortho: float,
    maximize: bool,
    row_dim: int,
    row_groups: int,
    compile: bool,
    workspace: Workspace,
    observe: Observe | None,
) -> None:
    # d = momentum * tau - lr * h; without momentum the walk has no e but h itself.
    push, scale = (-lr / momentum, momentum) if momentum else (0.0, -lr)
    walk = Walk(grad_clip, push=push, scale=scale, keep=momentum)
    if not compile:
        left = step_natively(
            (params, grads, buffers, (), ()),
            walk,
            ortho=ortho,
            maximize=maximize,
            row_dim=row_dim,
            row_groups=row_groups,
            workspace=workspace,
            observe=observe,
        )
        params, grads, buffers = pick(params, left), pick(grads, left), pick(buffers, left)
        observe = renumbered(observe, left)

    def make() -> list[Tile]:
        moments: Sequence[Tensor | None] = buffers or [None] * len(params)
        layouts = [RowLayout.of(p, row_dim, row_groups) for p in params]
        jobs = [Job(i, *job) for i, job in enumerate(zip(layouts, params, moments, strict=True))]
        return tiles(jobs, whole_blocks=ortho != 0)

    addresses = [t.data_ptr() for t in (*params, *buffers)]
    for tile in workspace.plan((row_dim, row_groups, ortho != 0, *addresses), make):
        tile.load(grads, workspace)
        step_tile(tile, walk, ortho, maximize, compile, workspace, observe)
