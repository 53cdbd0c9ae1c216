"""What both manifold optimizers share: param groups, state, the closure, and saving and loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from flexnorm.optim.manifold import unit
from flexnorm.optim.rows import RowLayout, Workspace, compute_dtype, from_rows, local_part, to_rows

__all__ = ["ExactState", "Observer", "SphereOptimizer", "StepView"]

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class StepView:
    """What an observer is told about one parameter in one step.

    Attributes:
        param: The parameter.
        angle: Angle walked by every row, radians, ``(rows,)``.
        tangent_norm: Norm of the Riemannian gradient of every row before clipping, ``(rows,)``.
        grad_clip: The bound in force, or None.
        row_dim: Axis of the output units.
        blocks: Groups of the convolution.
    """

    param: Tensor
    angle: Tensor
    tangent_norm: Tensor
    grad_clip: float | None
    row_dim: int
    blocks: int


Observer = Callable[[StepView], None]


class ExactState(Optimizer):
    """An optimizer whose saved state comes back as it was."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the tensors are copied, and keep the dtype in which they were saved.

        ``torch.optim.Optimizer`` casts the state to the dtype of the parameter, which would round the float32 state of
        bfloat16 parameters, and shares memory with the dict where it does not cast.
        """
        seen: list[dict[str, Any]] = []
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = seen[0]
        indices = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            for key, value in saved["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().to(device=device, copy=True)


class SphereOptimizer(ExactState):
    """Base of :class:`SGDG` and :class:`AdamG`: groups on the manifold, and ordinary groups beside them.

    Attributes:
        observer: Called with a :class:`StepView` for every manifold parameter of every step, or None. Not part of the
            state; :class:`flexnorm.optim.SphereMonitor` sets it.
    """

    observer: Observer | None = None
    _group_defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        self._workspace = Workspace()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, giving keys that an older version did not know their default."""
        super().__setstate__(state)
        self._workspace = Workspace()
        for group in self.param_groups:
            for key, value in self._group_defaults.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked in full; the caller's dict is not changed.

        Raises:
            ValueError: If a value is out of range, or a parameter of a manifold group has no rows.
            TypeError: If a parameter of a manifold group is complex.
        """
        if isinstance(param_group, dict):
            param_group = dict(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if lr is None:
            raise ValueError(f"no learning rate: give {type(self).__name__} an lr, or every param group its own 'lr'")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"a tensor lr must have one element, this one has shape {tuple(lr.shape)}")
        for key in ("lr", "weight_decay", "ortho"):
            check_at_least(key, float(group[key]), 0.0)
        if group["grad_clip"] is not None and not group["grad_clip"] > 0:
            raise ValueError(f"grad_clip must be positive, or None for no clipping; got {group['grad_clip']}")
        if not group["manifold"]:
            return
        if group["row_dim"] not in (0, 1):
            raise ValueError(f"row_dim must be 0, or 1 for a transposed convolution; got {group['row_dim']!r}")
        if group["weight_decay"] != 0:
            raise ValueError(
                f"weight_decay={group['weight_decay']} in a manifold group: rows of unit length have nothing to decay; "
                "set weight_decay=0 there (ortho is the regularizer on the manifold)"
            )
        for p in group["params"]:
            if p.is_complex():
                raise TypeError(f"a complex parameter of shape {tuple(p.shape)} cannot go on the manifold of real rows")
            RowLayout.of(p, group["row_dim"], group["row_groups"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`ExactState.load_state_dict`."""
        self._workspace = Workspace()  # plans hold on to the state as it was
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Optional function that evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups()
        return loss

    # Tracing through the packing of tiles buys nothing: the compiled path compiles the arithmetic inside instead.
    @torch.compiler.disable
    def _step_groups(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients; use sparse=False")
            if group["manifold"]:
                self._step_manifold(group, params)
            else:
                self._step_flat(group, params)

    def _step_manifold(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_flat(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _observe(self, group: dict[str, Any], params: list[Tensor]) -> Callable[[int, Tensor, Tensor], None] | None:
        observer = self.observer
        if observer is None:
            return None

        def tell(index: int, angle: Tensor, norm: Tensor) -> None:
            observer(StepView(params[index], angle, norm, group["grad_clip"], group["row_dim"], group["row_groups"]))

        return tell


def check_at_least(name: str, value: float, low: float) -> None:
    """Raise ValueError if ``value`` is below ``low`` or no number."""
    if not value >= low or math.isinf(value):
        raise ValueError(f"{name} must be a finite number of at least {low:g}; got {value}")


def check_below_one(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= ``value`` < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1; got {value}")


def fused_takes(*tensors: Sequence[Tensor | None]) -> bool:
    """Tell whether torch's fused kernels take parameters and what goes with them (lists of one length, None left out).

    They read memory from end to end, in one dtype: mixed dtypes, strides and sharded parameters are for the others.
    """
    present = [t for kind in tensors for t in kind if t is not None]
    dtype = present[0].dtype
    if dtype not in (torch.float32, torch.float64) or present[0].device.type not in ("cpu", "cuda"):
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == dtype and t.is_contiguous() for t in present)


def fresh_state(p: Tensor) -> Tensor:
    """Return zeros of the shape and memory format of ``p``, in the dtype of the state (float32 or float64)."""
    return torch.zeros_like(p, dtype=compute_dtype(p), memory_format=torch.preserve_format)


@torch.no_grad()
def put_on_sphere(p: Tensor, row_dim: int, blocks: int) -> None:
    """Bring the rows of a weight to unit length, in place, whatever their length is."""
    p = local_part(p, row_dim, needs_whole=False)
    if p.numel():
        layout = RowLayout.of(p, row_dim, blocks)
        from_rows(unit(to_rows(p, layout).to(compute_dtype(p))), p, layout)
