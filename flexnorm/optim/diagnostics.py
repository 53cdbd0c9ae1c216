"""What the rows on the manifold do while the network trains: angles walked, gradients, clipping, coherence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor

from flexnorm._messages import nothing_done
from flexnorm.optim.base import SphereOptimizer, StepView
from flexnorm.optim.manifold import coherence
from flexnorm.optim.rows import RowLayout, local_part, to_rows


@dataclass(frozen=True)
class StepStats:
    """One parameter after one step.

    Attributes:
        angle_mean: Mean angle walked by a row, radians. It is the effective learning rate of the layer.
        angle_max: Largest angle walked by a row, radians.
        tangent_norm: Mean norm of the Riemannian gradient of a row, regularizer included, before clipping.
        clipped: Share of rows whose gradient was clipped, 0 to 1.
        coherence_mean: Mean magnitude of the cosine between two rows of the weight.
        coherence_max: Largest magnitude of the cosine between two rows of the weight.
    """

    angle_mean: float
    angle_max: float
    tangent_norm: float
    clipped: float
    coherence_mean: float
    coherence_max: float

    def asdict(self) -> dict[str, float]:
        """Return the fields as a dict."""
        return asdict(self)


class SphereMonitor:
    """Listens to an optimizer and says what its last step did to every weight on the manifold.

    Watching costs the optimizer nothing but two short vectors per parameter; numbers are computed when asked for. The
    steps themselves are the same to the last bit.

    Args:
        optimizer: A :class:`SGDG` or :class:`AdamG`.
        named_parameters: Names, as ``model.named_parameters()`` gives them; without, parameters are numbered.

    Raises:
        TypeError: If the optimizer is none of the manifold optimizers.
        RuntimeError: On entering, if another monitor is listening already.

    Warns:
        flexnorm.NothingDone: If no group of the optimizer is on the manifold, so that there is nothing to see.

    Examples:
        >>> import torch
        >>> from flexnorm.optim import SGDG
        >>> weight = torch.nn.Parameter(torch.eye(2, 3))
        >>> optimizer = SGDG([weight], lr=0.5, grad_clip=None, ortho=0)
        >>> with SphereMonitor(optimizer) as monitor:
        ...     weight[0, 1].backward()
        ...     optimizer.step()
        ...     stats = monitor.stats()["0"]
        >>> stats.angle_max, stats.angle_mean
        (0.5, 0.25)
    """

    def __init__(
        self, optimizer: SphereOptimizer, named_parameters: Iterable[tuple[str, Tensor]] | None = None
    ) -> None:
        if not isinstance(optimizer, SphereOptimizer):
            raise TypeError(f"SphereMonitor listens to SGDG and AdamG, not to {type(optimizer).__name__}")
        self.optimizer = optimizer
        all_parameters = (p for group in optimizer.param_groups for p in group["params"])
        if named_parameters is None:
            named_parameters = ((str(i), p) for i, p in enumerate(all_parameters))
        self._names = {p: name for name, p in named_parameters}
        self._last: dict[str, StepView] = {}
        if not any(group["manifold"] for group in optimizer.param_groups):
            off = [(self._name(p), "off the sphere") for group in optimizer.param_groups for p in group["params"]]
            nothing_done("SphereMonitor sees nothing", "parameters", off, "It watches groups with manifold=True.")

    def __enter__(self) -> SphereMonitor:
        if self.optimizer.observer is not None:
            raise RuntimeError("the optimizer is being watched already; leave the other monitor first")
        self.optimizer.observer = self._listen
        return self

    def __exit__(self, *_: object) -> None:
        self.optimizer.observer = None

    def _listen(self, view: StepView) -> None:
        self._last[self._name(view.param)] = view

    def _name(self, p: Tensor) -> str:
        return self._names.get(p, f"unnamed {tuple(p.shape)}")

    def stats(self) -> dict[str, StepStats]:
        """Return the numbers of the last step that each parameter took part in, by name."""
        return {name: _stats(view) for name, view in self._last.items()}


def _stats(view: StepView) -> StepStats:
    options = view.options
    weight = local_part(view.param.detach(), options.row_dim, needs_whole=False)
    layout = RowLayout.of(weight, options.row_dim, options.row_groups, options.row_units)
    rows = to_rows(weight, layout)
    clipped = 0.0 if options.grad_clip is None else float((view.tangent_norm > options.grad_clip).float().mean())
    angles = float(view.angle.mean()), float(view.angle.max())
    return StepStats(*angles, float(view.tangent_norm.mean()), clipped, *coherence(rows, layout.blocks))
