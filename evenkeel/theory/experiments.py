"""Training experiments of Luo et al. 2019, Sec. 5, at any scale: what Fig. 2 shows, on images that the caller provides.

The network is that of Fig. 2(c, d): four convolutions and two dense layers (after Salimans and Kingma 2016), with the
normalization as the only difference. Settings that the paper leaves to its appendix (widths, rates, lengths) are
arguments here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenkeel._messages import unknown_name
from evenkeel.nn import BatchNorm1d, BatchNorm2d, make_norm
from evenkeel.theory.figures import Curve, Figure
from evenkeel.theory.population import PopulationEstimator, estimate_population
from evenkeel.theory.regularization import GammaDecay, batch_norm_layers

__all__ = [
    "VARIANTS",
    "Images",
    "Run",
    "conv_net",
    "figure_2ab",
    "figure_2cd",
    "figure_2ef",
    "train",
    "weight_normalized",
]

VARIANTS: tuple[str, ...] = ("none", "batch", "population", "weight", "weight+mean", "weight+variance")
"""Plain SGD, BN, PN, WN, WN with mean-only BN, WN with variance-only BN."""


@dataclass(frozen=True)
class Images:
    """A data set as tensors.

    Attributes:
        x_train: (N, C, H, W), float, standardized.
        y_train: (N,), class numbers.
        x_test: (M, C, H, W).
        y_test: (M,).
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


class _Affine(nn.Module):
    """A scale and a shift per channel, where a network has no normalization."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.dim() - 2)
        return x * self.weight.view(shape) + self.bias.view(shape)


class _UnitRows(nn.Module):
    """Every output's weight vector divided by its norm; the small number keeps a zero vector differentiable."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.rsqrt(weight.flatten(1).square().sum(1) + 1e-12).view((-1,) + (1,) * (weight.dim() - 1))


def weight_normalized(layer: nn.Module) -> nn.Module:
    """Give a linear or convolutional layer weight vectors of norm 1, in place; a layer behind it has the scale.

    Args:
        layer: A layer whose ``weight`` has outputs on its first axis.

    Returns:
        The layer.
    """
    nn.utils.parametrize.register_parametrization(layer, "weight", _UnitRows())
    return layer


def _norm(variant: str, channels: int, dense: bool) -> nn.Module:
    """The normalization of a variant; "none" and "weight" get a scale and a shift."""
    names = {"weight+mean": "mean_only", "weight+variance": "variance_only"}
    if variant in ("none", "weight"):
        layer: nn.Module = _Affine(channels)
    else:
        extra = {"statistics": "estimated"} if variant == "population" else {}
        layer = make_norm(names.get(variant, variant), channels, 0 if dense else 2, **extra)
    if variant.startswith("weight"):
        # Unit weights and inputs of unit variance give outputs of unit variance; ReLU halves their square.
        nn.init.constant_(layer.weight, 2**0.5)  # type: ignore[arg-type]
    return layer


def conv_net(
    norms: str | Sequence[str] = "batch", *, in_channels: int = 3, classes: int = 10, width: int = 16, seed: int = 0
) -> nn.Sequential:
    """Return the network of Fig. 2(c, d): four 3x3 convolutions with two poolings, a hidden and an output dense layer.

    Args:
        norms: One of `VARIANTS` for all five normalized layers, or five of them.
        in_channels: Channels of the images.
        classes: Number of classes.
        width: Channels of the first two convolutions; the others have twice as many.
        seed: Of the initial weights.

    Raises:
        ValueError: For an unknown variant or another number than five.
    """
    chosen = [norms] * 5 if isinstance(norms, str) else list(norms)
    if len(chosen) != 5:
        raise ValueError(f"the network has 5 normalized layers, got {len(chosen)} names: {chosen}")
    for name in chosen:
        if name not in VARIANTS:
            raise ValueError(unknown_name("variant", name, VARIANTS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [in_channels, width, width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for index, variant in enumerate(chosen):
            dense = index == 4
            out = 4 * width if dense else sizes[index + 1]
            if dense:
                layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
            linear: nn.Module = (
                nn.Linear(8 * width, out, bias=False)
                if dense
                else nn.Conv2d(sizes[index], out, 3, padding=1, bias=False)
            )
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")  # type: ignore[arg-type]
            if variant.startswith("weight"):
                linear = weight_normalized(linear)
            layers += [linear, _norm(variant, out, dense), nn.ReLU()]
            if index in (1, 3):
                layers.append(nn.MaxPool2d(2))
        return nn.Sequential(*layers, nn.Linear(4 * width, classes))


@dataclass(frozen=True)
class Run:
    """One training. Tuples have one value per epoch.

    Attributes:
        label: What was trained.
        train_loss: Mean cross entropy on (a part of) the training set, in evaluation mode.
        test_loss: The same on the test set.
        test_accuracy: In [0, 1].
        gamma_squared: Mean of gamma^2 over the channels of all batch-normalized layers; NaN without any.
    """

    label: str
    train_loss: tuple[float, ...]
    test_loss: tuple[float, ...]
    test_accuracy: tuple[float, ...]
    gamma_squared: tuple[float, ...]


def train(
    model: nn.Module,
    data: Images,
    *,
    batch_size: int = 128,
    epochs: int = 10,
    lr: float = 0.1,
    momentum: float = 0.9,
    gamma_decay: GammaDecay | None = None,
    renew_every: int = 10,
    pool: int = 10_000,
    label: str = "",
    seed: int = 0,
) -> Run:
    """Train with SGD, momentum and a cosine from `lr` to 0, and return what Fig. 2 plots.

    Args:
        model: The network; PopulationNorm layers with estimated statistics are renewed as it goes.
        data: The images.
        batch_size: M.
        epochs: Passes.
        lr: Learning rate at the start; the paper scales it linearly with the batch size.
        momentum: Of SGD.
        gamma_decay: Its penalty is added to the loss; if adaptive, it is updated when the statistics are renewed.
        renew_every: Steps between two estimates of population statistics and of zeta.
        pool: Training samples behind each estimate (the paper: 10,000), at most all.
        label: Name of the run.
        seed: Of the order of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(data.x_train)
    estimated = any(getattr(module, "source", "") == "estimated" for module in model.modules())
    population = (
        PopulationEstimator(model, data.x_train, size=pool, every=renew_every, seed=seed) if estimated else None
    )
    batch_size = min(batch_size, n)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    steps = epochs * (n // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: list[tuple[float, float, float, float]] = []
    step = 0
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        for first in range(0, n - batch_size + 1, batch_size):
            index = order[first : first + batch_size]
            if population is not None:
                population()
            if gamma_decay is not None and isinstance(gamma_decay.coefficient, str) and step % renew_every == 0:
                sample = torch.randint(n, (min(512, n),), generator=generator)
                gamma_decay.update(data.x_train[sample], data.y_train[sample])
            model.train()
            loss = F.cross_entropy(model(data.x_train[index]), data.y_train[index])
            if gamma_decay is not None:
                loss = loss + gamma_decay.penalty()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            step += 1
        if population is not None:
            estimate_population(model, data.x_train[:pool])
        history.append(_measure(model, data))
    columns = list(zip(*history, strict=True))
    return Run(label, columns[0], columns[1], columns[2], columns[3])


@torch.no_grad()
def _measure(model: nn.Module, data: Images) -> tuple[float, float, float, float]:
    model.eval()

    def evaluate(x: Tensor, y: Tensor) -> tuple[float, float]:
        logits = torch.cat([model(part) for part in torch.split(x, 1000)])
        return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())

    train_loss, _ = evaluate(data.x_train[:10_000], data.y_train[:10_000])
    test_loss, accuracy = evaluate(data.x_test, data.y_test)
    weights = [module.weight for module in batch_norm_layers(model).values() if isinstance(module.weight, Tensor)]
    gamma = float(torch.cat(weights).square().mean()) if weights else float("nan")
    return train_loss, test_loss, accuracy, gamma


def _lines(runs: Sequence[Run]) -> tuple[Curve, ...]:
    curves = []
    for run in runs:
        epochs = tuple(float(epoch + 1) for epoch in range(len(run.train_loss)))
        curves.append(Curve(f"{run.label}: training", epochs, run.train_loss))
        curves.append(Curve(f"{run.label}: test", epochs, run.test_loss))
    return tuple(curves)


def _net(norms: str | Sequence[str], data: Images, width: int, seed: int) -> nn.Sequential:
    classes = int(data.y_train.max()) + 1
    return conv_net(norms, in_channels=data.x_train.shape[1], classes=classes, width=width, seed=seed)


def figure_2ab(
    data: Images,
    *,
    batch_sizes: tuple[int, int] = (128, 1024),
    epochs: int = 20,
    lr: float = 0.1,
    width: int = 16,
    pool: int = 10_000,
    coefficient: str | float = "adaptive",
    seed: int = 0,
) -> tuple[Figure, list[Run]]:
    """PN + gamma decay against BN at a usual and a large batch (Fig. 2(a, b)).

    Args:
        data: The images.
        batch_sizes: The usual one, which PN trains at and whose noise its gamma decay stands for, and a large one.
        epochs: Passes of every run.
        lr: Learning rate at the usual batch size, scaled linearly to the other.
        width: Of the network.
        pool: Samples behind the population statistics.
        coefficient: Of the gamma decay.
        seed: Of weights and order.

    Returns:
        The figure (losses by epoch) and the runs.
    """
    usual, large = batch_sizes
    runs = [
        train(
            _net("batch", data, width, seed),
            data,
            batch_size=size,
            epochs=epochs,
            lr=lr * size / usual,
            label=f"BN, M={size}",
            seed=seed,
        )
        for size in (usual, large)
    ]
    for decayed in (False, True):
        model = _net("population", data, width, seed)
        decay = GammaDecay(model, usual, coefficient) if decayed else None
        label = f"PN + gamma decay, M={usual}" if decayed else f"PN, M={usual}"
        setting = {"batch_size": usual, "epochs": epochs, "pool": pool, "seed": seed}
        runs.append(train(model, data, lr=lr, gamma_decay=decay, label=label, **setting))
    return Figure(
        "figure-2ab",
        "Population normalization with gamma decay against BN",
        "epoch",
        "cross entropy",
        _lines(runs),
        f"width {width}, learning rate {lr} at M={usual}, scaled linearly.",
        log="y",
    ), runs


def figure_2cd(
    data: Images, *, batch_size: int = 128, epochs: int = 20, lr: float = 0.05, width: int = 16, seed: int = 0
) -> tuple[Figure, list[Run]]:
    """The parts of BN (Fig. 2(c, d)): SGD, WN, BN, WN with mean-only and with variance-only BN.

    Takes what `figure_2ab` takes; returns the figure and the runs.
    """
    names = {
        "none": "SGD",
        "weight": "WN",
        "batch": "BN",
        "weight+mean": "WN + mean-only BN",
        "weight+variance": "WN + variance-only BN",
    }
    runs = [
        train(_net(v, data, width, seed), data, batch_size=batch_size, epochs=epochs, lr=lr, label=label, seed=seed)
        for v, label in names.items()
    ]
    return Figure(
        "figure-2cd",
        "The parts of batch normalization",
        "epoch",
        "cross entropy",
        _lines(runs),
        f"M={batch_size}, width {width}, learning rate {lr}.",
        log="y",
    ), runs


def figure_2ef(
    data: Images,
    *,
    layers: Sequence[int] = (0, 1, 2, 3, 4),
    batch_sizes: Sequence[int] = (16, 64, 256),
    epochs: int = 20,
    lr: float = 0.02,
    width: int = 16,
    seed: int = 0,
) -> tuple[Figure, Figure, list[Run]]:
    """BN at a single layer, the others plain: gamma^2 and the test loss against the batch size (Fig. 2(e, f)).

    Args:
        data: The images.
        layers: Which layers get BN, one at a time; 0 to 3 are the convolutions, 4 is the hidden dense layer.
        batch_sizes: Batch sizes.
        epochs: Passes of every run.
        lr: Learning rate at the first batch size; it grows with the square root of the batch size, at most to 0.1,
            because a network that is plain but for one layer does not bear linear scaling.
        width: Of the network.
        seed: Of weights and order.

    Returns:
        The figure of gamma^2, the figure of the test loss, and the runs (layer by layer, batch sizes within).
    """
    runs, gammas, losses = [], [], []
    for layer in layers:
        found = []
        for size in batch_sizes:
            model = _net(["batch" if index == layer else "none" for index in range(5)], data, width, seed)
            rate = min(0.1, lr * (size / batch_sizes[0]) ** 0.5)
            run = train(
                model,
                data,
                batch_size=size,
                epochs=epochs,
                lr=rate,
                label=f"layer {layer}, M={size}",
                seed=seed,
            )
            batch = next(m for m in model.modules() if isinstance(m, (BatchNorm1d, BatchNorm2d)))
            assert batch.weight is not None
            found.append((float(batch.weight.detach().square().mean()), run.test_loss[-1]))
            runs.append(run)
        x = tuple(float(size) for size in batch_sizes)
        gammas.append(Curve(f"layer {layer}", x, tuple(pair[0] for pair in found)))
        losses.append(Curve(f"layer {layer}", x, tuple(pair[1] for pair in found)))
    notes = f"{epochs} epochs, width {width}."
    title = "BN at a single layer"
    return (
        Figure("figure-2e", title, "batch size M", "mean gamma^2", tuple(gammas), notes, log="x"),
        Figure("figure-2f", title, "batch size M", "test loss", tuple(losses), notes, log="x"),
        runs,
    )
