"""What the optimizers share: param groups, state, the closure, saving and loading, and SGD off the manifold."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, SupportsFloat, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from flexnorm.optim.batches import State, Workspace, take_step
from flexnorm.optim.manifold import unit
from flexnorm.optim.rows import RowLayout, compute_dtype, from_rows, local_part, to_rows
from flexnorm.optim.step import Rotation, StepOptions

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class StepView:
    """What an observer is told about one parameter in one step.

    Attributes:
        param: The parameter.
        angle: Angle walked by every row, radians, ``(rows,)``.
        tangent_norm: Norm of the Riemannian gradient of every row before clipping, ``(rows,)``.
        options: What its group says about the step.
    """

    param: Tensor
    angle: Tensor
    tangent_norm: Tensor
    options: StepOptions


Observer = Callable[[StepView], None]


class ExactState(Optimizer):
    """An optimizer whose saved state comes back as it was, and whose groups are told apart in :meth:`_step_group`.

    Args:
        params: Parameters, named parameters or param groups.
        arguments: What the constructor was called with, its ``locals()``: all but ``params`` are keys of the groups.
    """

    def __init__(self, params: Params, arguments: dict[str, Any]) -> None:
        others = ("self", "params", "__class__")
        super().__init__(params, {key: value for key, value in arguments.items() if key not in others})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked in full; the caller's dict is not changed.

        Raises:
            ValueError: If a value is missing or out of range, or a parameter of a manifold group has no rows.
            TypeError: If a parameter of a manifold group is complex.
        """
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if lr is None:
            raise ValueError(f"no learning rate: give {type(self).__name__} an lr, or every param group its own 'lr'")
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"a tensor lr must have one element, this one has shape {tuple(lr.shape)}")
        check_at_least_zero(group, "lr", "weight_decay")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the tensors are copied, and keep the dtype in which they were saved.

        ``torch.optim.Optimizer`` casts the state to the dtype of the parameter, which would round the float32 state of
        bfloat16 parameters, and shares memory with the dict where it does not cast.
        """
        seen: list[dict[str, Any]] = []
        with self.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded)):
            super().load_state_dict(state_dict)
        saved = seen[0]
        indices = [i for group in saved["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            for key, value in saved["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = value.device if key == "step" else p.device
                    self.state[p][key] = value.detach().to(device=device, copy=True)

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

    # Tracing through the packing of batches buys nothing: the compiled path compiles the arithmetic inside instead.
    @torch.compiler.disable
    def _step_groups(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _fresh(self, params: list[Tensor], key: str) -> list[Tensor]:
        """Return a kind of state; it starts as zeros in the shape and memory format of a parameter."""
        for p in params:
            if key not in self.state[p]:
                self.state[p][key] = torch.zeros_like(p, dtype=compute_dtype(p), memory_format=torch.preserve_format)
        return [self.state[p][key] for p in params]


class SphereOptimizer(ExactState):
    """Base of :class:`SGDG` and :class:`AdamG`: groups on the manifold, and ordinary groups beside them.

    Attributes:
        observer: Called with a :class:`StepView` for every manifold parameter of every step, or None. Not part of the
            state; :class:`flexnorm.optim.SphereMonitor` sets it.
    """

    observer: Observer | None = None
    # What groups saved before a key existed were stepped with, where that is not the default of now.
    _before: ClassVar[dict[str, object]] = {"ortho_every": 1}

    def __init__(self, params: Params, arguments: dict[str, Any]) -> None:
        self._workspace = Workspace()
        super().__init__(params, arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, giving keys that an older version did not know what it did."""
        super().__setstate__(state)
        self._workspace = Workspace()  # plans hold on to the state as it was
        named = next(cls for cls in type(self).__mro__ if SphereOptimizer in cls.__bases__)
        for key, parameter in inspect.signature(named).parameters.items():
            for group in self.param_groups:
                group.setdefault(key, self._before.get(key, parameter.default))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_at_least_zero(group, "ortho")
        every = group["ortho_every"]
        if type(every) is not int or every < 1:
            raise ValueError(f"ortho_every must be a whole number of at least 1; got {every!r}")
        clip = group["grad_clip"]
        if clip is not None and (isinstance(clip, str) or not clip > 0):
            raise ValueError(f"grad_clip must be positive, or None for no clipping; got {clip!r}")
        if not group["manifold"]:
            return
        if group["row_dim"] not in (0, 1):
            where = "row_dim is the axis of the outputs: 0, or 1 of transposed convolutions and weights (in, out)"
            raise ValueError(f"{where}; got {group['row_dim']!r}")
        units = group["row_units"]
        if type(units) is not int or units < 0:
            raise ValueError(f"row_units must be a whole number of output units, or 0 for all; got {units!r}")
        if group["weight_decay"] != 0:
            raise ValueError(
                f"weight_decay={group['weight_decay']} in a manifold group: rows of unit length have nothing to decay; "
                "set weight_decay=0 there (ortho is the regularizer on the manifold)"
            )
        for p in group["params"]:
            if p.is_complex():
                raise TypeError(f"a complex parameter of shape {tuple(p.shape)} cannot go on the manifold of real rows")
            RowLayout.of(p, group["row_dim"], group["row_groups"], group["row_units"])

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            raise RuntimeError(f"{type(self).__name__} does not take sparse gradients; use sparse=False")
        if not group["manifold"]:
            self._step_flat(group, params)
            return
        options, observer = StepOptions.of(group), self.observer
        due, rest = self._turns(group, params)
        strength = options.ortho * group["ortho_every"]
        for params, now in ((due, replace(options, ortho=strength)), (rest, replace(options, ortho=0.0))):
            if params:
                state, rotation = self._prepare(group, params, options)
                observe = None if observer is None else partial(_tell, observer, params, options)
                grads = [cast(Tensor, p.grad) for p in params]
                take_step(params, grads, state, rotation, now, self._workspace, observe)

    def _turns(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Tell weights that the regularizer acts on in this step from the others.

        Its turn comes every ``ortho_every`` steps of a weight. Weights begin at different steps, so that all steps of
        a group cost about the same; how many are still to go is in the state.
        """
        every, key = group["ortho_every"], "ortho_wait"
        if every == 1 or not group["ortho"]:
            return (params, []) if group["ortho"] else ([], params)
        new = [p for p in params if key not in self.state[p]]
        if new:
            loads = [0] * every
            for p in group["params"]:
                if key in self.state.get(p, {}):
                    loads[self.state[p][key] % every] += _products(p, group)
            for p in sorted(new, key=lambda p: _products(p, group), reverse=True):
                turn = self.state[p][key] = loads.index(min(loads))
                loads[turn] += _products(p, group)
        due: list[Tensor] = []
        rest: list[Tensor] = []
        for p in params:
            wait = min(self.state[p][key], every - 1)  # of a smaller number since the last step, if it was changed
            (rest if wait else due).append(p)
            self.state[p][key] = (wait or every) - 1
        return due, rest

    def _prepare(self, group: dict[str, Any], params: list[Tensor], options: StepOptions) -> tuple[State, Rotation]:
        """Bring weights that are new to the sphere; return the state of all and the numbers of the step."""
        raise NotImplementedError

    def _put_on_sphere(self, p: Tensor, options: StepOptions) -> int:
        """Bring the rows of a weight to unit length, whatever their length is; return their number."""
        p = local_part(p, options.row_dim, needs_whole=options.ortho != 0 or options.row_units != 1)
        layout = RowLayout.of(p, options.row_dim, options.row_groups, options.row_units)
        if p.numel():
            from_rows(unit(to_rows(p, layout).to(compute_dtype(p))), p, layout)
        return layout.rows

    def _step_flat(self, group: dict[str, Any], params: list[Tensor]) -> None:
        raise NotImplementedError

    def _step_sgd(self, group: dict[str, Any], params: list[Tensor], momentum: float) -> None:
        """Take a step of torch's SGD, off the manifold."""
        buffers = self._fresh(params, "momentum_buffer") if momentum else [None] * len(params)
        grads = [cast(Tensor, p.grad) for p in params]
        fused = group["foreach"] is not False and fused_takes(params, grads, buffers)
        sgd(
            params,
            grads,
            cast(list[Tensor | None], buffers),
            foreach=False if fused else group["foreach"],
            fused=fused,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"] and momentum > 0,
            maximize=group["maximize"],
        )


def _tell(
    observer: Observer, params: list[Tensor], options: StepOptions, index: int, angle: Tensor, norm: Tensor
) -> None:
    observer(StepView(params[index], angle, norm, options))


def _products(p: Tensor, group: dict[str, Any]) -> int:
    """Return what the products of the regularizer cost for a weight, up to a factor."""
    layout = RowLayout.of(p, group["row_dim"], group["row_groups"], group["row_units"])
    return layout.rows * layout.n * min(layout.rows // layout.blocks, layout.n)


def check_at_least_zero(values: dict[str, Any], *names: str) -> None:
    """Raise ValueError if a value is below zero or no finite number."""
    for name in names:
        if not isinstance(values[name], SupportsFloat) or not values[name] >= 0 or math.isinf(values[name]):
            raise ValueError(f"{name} must be a finite number of at least 0; got {values[name]!r}")


def check_below_one(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= ``value`` < 1."""
    if not isinstance(value, SupportsFloat) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1; got {value!r}")


def fused_takes(*tensors: Sequence[Tensor | None]) -> bool:
    """Tell whether torch's fused kernels take parameters and what goes with them (lists of one length, None left out).

    They read memory from end to end, in one dtype: mixed dtypes, strides and sharded parameters are for the others.
    """
    present = [t for kind in tensors for t in kind if t is not None]
    dtype = present[0].dtype
    if dtype not in (torch.float32, torch.float64) or present[0].device.type not in ("cpu", "cuda"):
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == dtype and t.is_contiguous() for t in present)
