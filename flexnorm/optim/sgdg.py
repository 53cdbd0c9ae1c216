r"""SGD-G: SGD with momentum on the manifold of scale-invariant weights.

Paper: Cho and Lee, "Riemannian approach to batch normalization", NeurIPS 2017 (arXiv 1709.09603), Algorithm 1.

Deviations from the paper's own code: constructor arguments reach the groups (there ``omega`` was ignored); ``p.grad``
is not edited; the state survives changes of the learning rate; parameters of any dtype and memory format.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flexnorm.optim.base import Params, SphereOptimizer, check_below_one
from flexnorm.optim.batches import Observe, State, Workspace, take_step
from flexnorm.optim.step import Rotation, StepOptions


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
        row_dim: Axis of the output units: 0, or 1 for transposed convolutions and weights ``(in, out)``.
        row_groups: Groups of a grouped convolution; ``ortho`` does not compare rows of different groups.
        row_units: How many neighbouring output units are one vector on a sphere: 1, the size of a head, or 0 for the
            whole matrix (whose length is Frobenius').
        foreach: Work on many parameters at once (None and True), on the CPU in a compiled kernel where there is a C
            compiler; or on one after the other (False, slow).
        compile: Compile the arithmetic of the manifold step with TorchInductor.
        ortho_every: The regularizer's gradient is added every so many steps of a weight, as many times as strong,
            before the clip, and at other steps for other weights, so that all steps cost about the same. 1 is the
            paper's form; groups saved before there was a choice go on with it. 4 is for ``lr * ortho`` up to 0.06,
            three times the paper's; beyond, rows may swing.

    All arguments but ``params`` are keys of the param groups. On the manifold ``nesterov`` has no effect, and a
    ``weight_decay`` is an error.

    State, per parameter: ``momentum_buffer``, of the shape of the parameter, float32 (float64 for float64 parameters).
    On the manifold also ``on_sphere``, and with ``ortho_every`` above 1 ``ortho_wait``, the steps until the
    regularizer's turn.

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
        row_units: int = 1,
        foreach: bool | None = None,
        compile: bool = False,
        ortho_every: int = 4,
    ) -> None:
        super().__init__(params, locals())

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_below_one("momentum", group["momentum"])
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov=True needs a momentum above 0")

    def _prepare(self, group: dict[str, Any], params: list[Tensor], options: StepOptions) -> tuple[State, Rotation]:
        for p in params:
            if "on_sphere" not in self.state[p]:
                self._put_on_sphere(p, options)
                self.state[p]["on_sphere"] = True
        moments = self._fresh(params, "momentum_buffer") if group["momentum"] else []
        return State(moments), sgd_rotation(group["lr"], group["momentum"])

    def _step_flat(self, group: dict[str, Any], params: list[Tensor]) -> None:
        self._step_sgd(group, params, group["momentum"])


def sgd_rotation(lr: float | Tensor, momentum: float) -> Rotation:
    r"""The numbers of SGD-G, :math:`d = \gamma \tau - \eta h`; without momentum e is h."""
    if momentum == 0:
        return Rotation(push=0.0, scale=-lr, keep=0.0)
    return Rotation(push=-lr / momentum, scale=momentum, keep=momentum)


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
    row_units: int = 1,
    foreach: bool | None = None,
    compile: bool = False,
    workspace: Workspace | None = None,
    observe: Observe | None = None,
) -> None:
    """Functional form of :class:`SGDG` on the manifold: updates ``params`` and ``momentum_buffers`` in place.

    ``params`` are weights whose rows have unit length (or any: they are taken as directions), ``grads`` their
    gradients, not written to, ``momentum_buffers`` tangent vectors of the shapes of the weights, or None where
    ``momentum`` is 0. The regularizer is added in every call, at strength ``ortho``: by turns is with 0 between.
    ``lr``, ``momentum``, ``grad_clip``, ``ortho``, ``maximize``, ``row_dim``, ``row_groups``, ``row_units``,
    ``foreach`` and ``compile`` are those of the class; ``workspace`` holds buffers from step to step; ``observe`` is
    called per parameter with its index, the angle walked and the tangent norm of its rows.
    """
    state = State([buffer for buffer in momentum_buffers if buffer is not None])
    options = StepOptions(grad_clip, ortho, maximize, row_dim, row_groups, foreach, compile, row_units)
    take_step(params, grads, state, sgd_rotation(lr, momentum), options, workspace, observe)
