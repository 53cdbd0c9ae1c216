"""The data of the figures: curves from the formulas, points from the simulations, and one function to plot them.

Luo et al. 2019, Fig. 1(a, b); the dynamics of Sec. 3 and the regularization of Sec. 2 as figures of our own. Those that
need the training of networks, Fig. 2(a-f), are in `evenkeel.theory.experiments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from evenkeel._messages import unknown_name
from evenkeel.theory import dynamics, generalization, regularization

__all__ = ["FIGURES", "Curve", "Figure", "dynamics_figure", "figure_1a", "figure_1b", "plot", "regularization_figure"]


@dataclass(frozen=True)
class Curve:
    """One curve or one set of points.

    Attributes:
        label: For the legend.
        x: Abscissae.
        y: Values, as many.
        error: Standard errors, as many, or empty.
        points: Whether it is measured (drawn as points with error bars) or computed (drawn as a line).
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float, ...] = ()
    points: bool = False


@dataclass(frozen=True)
class Figure:
    """Everything that a figure shows, as plain numbers.

    Attributes:
        name: Short name, for files.
        title: What it shows.
        x_label: Abscissa.
        y_label: Ordinate.
        curves: The curves.
        notes: How it was computed and what to see.
        log: Which axes are logarithmic: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        y_limit: Upper end of the ordinate, or None.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    notes: str = ""
    log: str = ""
    y_limit: float | None = None

    def asdict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers."""
        return asdict(self)


def _grid(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * index / (count - 1) for index in range(count)]


def _points(label: str, alphas: Sequence[float], make: Callable[[float], generalization.Simulated]) -> Curve:
    values = [make(alpha) for alpha in alphas]
    return Curve(
        label, tuple(alphas), tuple(v.error for v in values), tuple(v.standard_error for v in values), points=True
    )


def figure_1a(
    *,
    batch_size: int = 32,
    noise: float = 0.25,
    alphas: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0),
    N: int = 256,
    runs: int = 6,
    epochs: Sequence[int] = (30, 300),
    seed: int = 0,
) -> Figure:
    """Generalization of linear students (Fig. 1(a)): SGD, BN, WN + gamma decay at ``1/(2M)`` and at its optimum.

    Args:
        batch_size: M.
        noise: Variance of the labels' noise.
        alphas: Samples per input of the simulated points.
        N: Inputs of the simulated students.
        runs: Training sets per point.
        epochs: Lengths of training of the BN students; one set of points each.
        seed: Of the simulations.
    """
    zeta, lines = 1.0 / (2 * batch_size), _grid(0.05, max(alphas), 180)

    def decay(alpha: float) -> float:
        return generalization.gamma_decay_linear(alpha, generalization.ridge_strength(zeta, alpha), noise)

    curves = [
        Curve("SGD", tuple(lines), tuple(generalization.sgd_linear(a, noise) for a in lines)),
        Curve("WN + gamma decay 1/(2M)", tuple(lines), tuple(decay(a) for a in lines)),
        Curve(
            "the same, as printed (no factor alpha)",
            tuple(lines),
            tuple(generalization.gamma_decay_linear(a, zeta, noise) for a in lines),
        ),
        Curve(
            "optimal decay",
            tuple(lines),
            tuple(generalization.gamma_decay_linear(a, generalization.optimum(noise), noise) for a in lines),
        ),
    ]
    common: dict[str, Any] = {"N": N, "runs": runs, "seed": seed}
    away = [alpha for alpha in alphas if alpha != 1.0]
    curves.append(_points("SGD, simulated", away, lambda a: generalization.simulate("sgd", a, noise, **common)))
    curves.append(
        _points(
            "decay, simulated", alphas, lambda a: generalization.simulate("gamma_decay", a, noise, zeta=zeta, **common)
        )
    )
    for length in epochs:
        extra: dict[str, Any] = {**common, "batch_size": batch_size, "epochs": length}
        make = _bn(noise, "identity", extra)
        curves.append(_points(f"BN, M={batch_size}, {length} epochs", alphas, make))
    return Figure(
        "figure-1a",
        "Generalization of a linear student",
        "samples per input, alpha",
        "generalization error",
        tuple(curves),
        f"Noise variance {noise}, M={batch_size}, N={N}, {runs} training sets. "
        "Where BN lies depends on how long it trains.",
        y_limit=2.0,
    )


def _bn(noise: float, activation: str, extra: dict[str, Any]) -> Callable[[float], generalization.Simulated]:
    return lambda alpha: generalization.simulate("batchnorm", alpha, noise, activation=activation, **extra)


def figure_1b(
    *,
    batch_size: int = 16,
    noise: float = 0.25,
    alphas: Sequence[float] = (0.25, 0.5, 1.0, 1.5, 1.9, 2.5, 3.0),
    N: int = 256,
    runs: int = 6,
    epochs: Sequence[int] = (30, 300),
    seed: int = 0,
) -> Figure:
    """Generalization of ReLU students (Fig. 1(b)): SGD as printed and simulated, WN + gamma decay ``1/(4M)``, BN.

    Takes what `figure_1a` takes.
    """
    zeta, lines = 1.0 / (4 * batch_size), _grid(0.05, 1.98, 150)
    common: dict[str, Any] = {"N": N, "runs": runs, "seed": seed}
    relu: dict[str, Any] = {**common, "activation": "relu"}
    curves = [
        Curve("SGD, as printed", tuple(lines), tuple(generalization.sgd_relu(a, noise) for a in lines)),
        _points(
            "regression on positive labels, simulated",
            [a for a in alphas if a < 1.75],
            lambda a: generalization.simulate("positive", a, noise, **common),
        ),
        _points("SGD, simulated", alphas, lambda a: generalization.simulate("sgd", a, noise, **relu)),
        _points(
            "WN + gamma decay 1/(4M), simulated",
            alphas,
            lambda a: generalization.simulate("gamma_decay", a, noise, zeta=zeta, **relu),
        ),
    ]
    for length in epochs:
        extra: dict[str, Any] = {**common, "batch_size": batch_size, "epochs": length}
        curves.append(_points(f"BN, M={batch_size}, {length} epochs", alphas, _bn(noise, "relu", extra)))
    return Figure(
        "figure-1b",
        "Generalization of a ReLU student of a linear teacher",
        "samples per input, alpha",
        "generalization error",
        tuple(curves),
        f"Noise variance {noise}, M={batch_size}, N={N}, {runs} training sets. "
        "The printed curve is that of the regression on positive labels; "
        "a trained ReLU student does better and does not diverge at 2.",
        y_limit=2.0,
    )


def dynamics_figure(
    *,
    activation: str = "relu",
    lr: float = 0.5,
    zeta: float = 0.125,
    quantity: str = "error",
    times: float = 20.0,
    N: int = 500,
    runs: int = 16,
    seed: int = 0,
) -> Figure:
    """The dynamics of BN, WN and SGD (Sec. 3): equations of motion as lines, online SGD as points.

    Args:
        activation: See `evenkeel.theory.dynamics.averages`.
        lr: The paper's eta.
        zeta: Gamma decay of BN.
        quantity: What to show: ``"error"``, ``"gamma"``, ``"R"``, ``"L"`` or ``"effective_lr"``.
        times: Last time, in samples per input.
        N: Inputs of the simulated students.
        runs: Simulated runs.
        seed: Of the simulations.

    Raises:
        ValueError: For an unknown quantity.
    """
    known = ("error", "gamma", "R", "L", "effective_lr")
    if quantity not in known:
        raise ValueError(unknown_name("quantity", quantity, known))
    curves = []
    marks = _grid(0.0, times, 11)
    for method in dynamics.METHODS:
        strength = zeta if method == "bn" else 0.0
        path = dynamics.solve(method, activation, lr, strength, times=times)
        runs_ = dynamics.simulate(method, activation, lr, strength, times=marks, N=N, runs=runs, seed=seed)
        curves.append(Curve(method.upper(), tuple(path.time.tolist()), tuple(getattr(path, quantity).tolist())))
        error = runs_.standard_error.get(quantity)
        curves.append(
            Curve(
                f"{method.upper()}, simulated",
                tuple(runs_.time.tolist()),
                tuple(getattr(runs_, quantity).tolist()),
                () if error is None else tuple(error.tolist()),
                points=True,
            )
        )
    return Figure(
        f"dynamics-{quantity}",
        f"Learning dynamics, {activation} students",
        "samples per input, t",
        quantity.replace("_", " "),
        tuple(curves),
        f"eta={lr}, zeta={zeta} for BN; N={N}, {runs} runs.",
    )


def regularization_figure(
    *, batch_sizes: Sequence[int] = (8, 16, 32, 64, 128, 256), samples: int = 640_000, seed: int = 0
) -> Figure:
    """Expected BN loss minus PN loss against the batch size (Eq. 3): predicted as lines, simulated as points.

    For a Gaussian pre-activation u, ``(0.7 u - h)^2 / 2`` and ``(0.7 relu(u) - relu(h))^2 / 2`` at gamma = 1.

    Args:
        batch_sizes: The values of M, each at least 4.
        samples: Samples per point.
        seed: Of the simulation.
    """

    def gaussian(n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    losses: dict[str, regularization.PreactivationLoss] = {
        "linear": lambda h, u: 0.5 * (0.7 * u - h) ** 2,
        "ReLU": lambda h, u: 0.5 * (0.7 * torch.relu(u) - torch.relu(h)) ** 2,
    }
    u = gaussian(samples, torch.Generator().manual_seed(seed + 1))
    sizes = tuple(float(size) for size in batch_sizes)
    curves = []
    for name, loss in losses.items():
        bend = regularization.curvature(loss, u)
        zetas = [regularization.zeta(bend, regularization.statistics_noise(size)) for size in batch_sizes]
        own = [z + regularization.own_batch_term(loss, u, size) for z, size in zip(zetas, batch_sizes, strict=True)]
        curves.append(Curve(f"{name}: zeta gamma^2", sizes, tuple(zetas)))
        curves.append(Curve(f"{name}: with the first-order term of own batches", sizes, tuple(own)))
        for mode in ("independent", "own"):
            gaps = [
                regularization.bn_gap(gaussian, loss, size, batches=samples // size, mode=mode, seed=seed)
                for size in batch_sizes
            ]
            curves.append(
                Curve(
                    f"{name}: simulated, {mode} statistics",
                    sizes,
                    tuple(gap.value for gap in gaps),
                    tuple(gap.standard_error for gap in gaps),
                    points=True,
                )
            )
    return Figure(
        "regularization",
        "What batch statistics add to the loss",
        "batch size M",
        "loss of BN minus loss of PN",
        tuple(curves),
        "gamma = 1, Gaussian pre-activations. Lines: second order in the noise; they miss O(1/M^2).",
        log="xy",
    )


FIGURES: dict[str, Callable[..., Figure]] = {
    "1a": figure_1a,
    "1b": figure_1b,
    "dynamics": dynamics_figure,
    "regularization": regularization_figure,
}
"""The figures that need no data, by name."""


def plot(figure: Figure, path: str | None = None, ax: Any = None) -> Any:
    """Draw a figure with matplotlib (``pip install evenkeel[plot]``).

    Args:
        figure: What to draw.
        path: File to write, its suffix choosing the format; None writes none.
        ax: Axes to draw into; a new figure by default.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'evenkeel[plot]'") from error
    if ax is None:
        ax = Canvas(figsize=(7.5, 4.8), layout="constrained").add_subplot()
    colors: dict[str, Any] = {}
    for curve in figure.curves:
        # "NAME, simulated" belongs to the line "NAME" and takes its colour.
        style: dict[str, Any] = {"label": curve.label, "color": colors.get(curve.label.removesuffix(", simulated"))}
        if curve.points:
            ax.errorbar(curve.x, curve.y, yerr=curve.error or None, fmt="o", markersize=4, capsize=2, **style)
        else:
            colors[curve.label] = ax.plot(curve.x, curve.y, **style)[0].get_color()
    for axis in figure.log:
        getattr(ax, f"set_{axis}scale")("log")
    if figure.y_limit is not None:
        ax.set_ylim(0.0, figure.y_limit)
    ax.set(xlabel=figure.x_label, ylabel=figure.y_label, title=figure.title)
    ax.legend(fontsize=8)
    if path is not None:
        ax.figure.savefig(path, dpi=150)
    return ax
