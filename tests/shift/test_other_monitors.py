"""Metrics beside the shift, the motion of weights, and the optimization shift, each against a computation by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from flexnorm.nn import make_norm
from flexnorm.optim import scale_invariant_weights
from flexnorm.shift import CSVSink, OptimizationMonitor, ShiftMonitor, WeightMonitor
from flexnorm.shift.monitor import Seen

X = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(3))
Y = torch.arange(16) % 4


def small(norm: str = "batch") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        make_norm(norm, 6),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, monitors: list[Any], steps: int, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, **options)
    for monitor in monitors:
        if hasattr(monitor, "_optimizer"):
            monitor._optimizer = optimizer
        monitor.start()
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, (X, Y)).backward()
        optimizer.step()
        for monitor in monitors:
            monitor.step()
    return optimizer


def record_of(layer: nn.Module, x: Tensor, *metrics: Any) -> dict[str, Any]:
    monitor = ShiftMonitor(layer, x, lambda *_: True, every=1, metrics=metrics)
    monitor.start()
    (record,) = monitor.step()
    return record.asdict()


def test_moments_of_the_output() -> None:
    x = torch.randn(50, 3, 4, 4).exp()
    x[:, 2] = 7.7
    numbers = record_of(nn.Identity(), x, "moments")
    rows = x.movedim(1, 0).flatten(1)[:2].double()
    assert numbers["kurtosis"] == pytest.approx(scipy.stats.kurtosis(rows, axis=1, fisher=False).mean(), rel=1e-4)
    assert numbers["variance"] == pytest.approx(float(rows.var(1, correction=0).sum() / 3), rel=1e-4)
    assert numbers["mean"] == pytest.approx(float(x.mean((0, 2, 3)).square().mean().sqrt()), rel=1e-5)
    assert numbers["dead"] == pytest.approx(1 / 3)
    assert math.isnan(record_of(nn.Identity(), torch.ones(4, 2), "moments")["kurtosis"])


def test_noise_of_batch_statistics_uses_the_running_ones_of_before() -> None:
    layer = nn.BatchNorm2d(3)
    x = 2 * torch.randn(8, 3, 4, 4) + 1
    layer(x)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    numbers = record_of(layer, x, "noise")
    m, v = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    assert numbers["noise_mean"] == pytest.approx(float(((m - mean).square() / (var + 1e-5)).mean().sqrt()), rel=1e-5)
    assert numbers["noise_variance"] == pytest.approx(float((v / (var + 1e-5) - 1).square().mean().sqrt()), rel=1e-5)
    standardized = ((x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]).square().mean() - 1
    assert numbers["noise"] == pytest.approx(float(standardized), rel=1e-4)
    assert math.isnan(record_of(nn.Identity(), x, "noise")["noise"])


def test_own_metrics_and_csv(tmp_path: Path) -> None:
    def largest(seen: Seen) -> dict[str, Tensor]:
        return {"largest": seen.output.amax()}

    model = small()
    sink = CSVSink(tmp_path / "s.csv")
    monitor = ShiftMonitor(model, X, every=1, metrics=["moments", largest], sinks=[sink])
    train(model, [monitor], 2)
    assert monitor.records[0].metrics["largest"] > 0
    assert (tmp_path / "s.csv").read_text().splitlines()[0].endswith("mean,variance,kurtosis,dead,largest")
    assert "kurtosis" in monitor.summary()["1"]
    again = ShiftMonitor(model, X, every=1, metrics="moments")
    again.load_state_dict(monitor.state_dict())
    assert again.records == monitor.records
    with pytest.raises(ValueError, match="did you mean 'moments'"):
        ShiftMonitor(model, X, metrics=["moment"])


def test_weights_turn_by_the_angle_and_rate_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}], lr=1.0
    )
    monitor = WeightMonitor(model, optimizer, every=1)
    assert monitor.weights == ("0.weight", "1.weight")
    with monitor, torch.no_grad():
        old = model[1].weight.clone()
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        model[1].weight.mul_(3)
        first, second = monitor.step()
    assert first.angle == pytest.approx(math.pi / 8)
    assert first.largest_angle == pytest.approx(math.pi / 4)
    assert first.norm == pytest.approx(math.sqrt(3))
    assert first.learning_rate == 0.5
    assert first.effective_rate == pytest.approx(0.5 * (1 / 2 + 1 / 4) / 2)
    # Three times as long in every output channel, in whatever axis that is: no turn.
    assert second.angle < 1e-6
    rows = torch.cat([part.transpose(0, 1).flatten(1) for part in (3 * old).chunk(2)])
    assert second.norm == pytest.approx(float(rows.square().sum(1).mean().sqrt()))


def test_effective_rate_settles_with_weight_decay() -> None:
    model = small()
    report = scale_invariant_weights(model, X)
    monitor = WeightMonitor(model, None, report, every=10)
    assert monitor.weights == tuple(report.selected) == ("0.weight",)
    train(model, [monitor], 30, weight_decay=0.05)
    assert [record.step for record in monitor.records] == [1, 11, 21]
    assert all(r.effective_rate >= r.learning_rate / r.norm**2 for r in monitor.records)  # Jensen
    no_optimizer = WeightMonitor(model, weights="0.*", every=1, anchor="initial")
    no_optimizer.start()
    (record,) = no_optimizer.step()
    assert math.isnan(record.effective_rate)
    assert record.anchor == "initial"
    with pytest.raises(ValueError, match=r"unknown weight or pattern '0\.bias'"):
        WeightMonitor(model, weights=["0.bias"])


def test_weight_and_optimization_monitors_resume_and_leave_training_alone() -> None:
    model = small()
    alone = copy.deepcopy(model)
    weights = WeightMonitor(model, every=2, lag=3)
    gradients = OptimizationMonitor(model, cross_entropy, (X, Y), every=2, lag=3)
    train(model, [weights, gradients], 4)
    rng = torch.get_rng_state()
    train(alone, [], 4)
    assert torch.equal(rng, torch.get_rng_state())
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(model[1].running_mean, alone[1].running_mean)
    for kind, monitor in (
        (lambda: WeightMonitor(model, weights._optimizer, every=2, lag=3), weights),
        (lambda: OptimizationMonitor(model, cross_entropy, (X, Y), every=2, lag=3), gradients),
    ):
        again = kind()
        again.load_state_dict(copy.deepcopy(monitor.state_dict()))
        assert again.step() == monitor.step()
        assert again.records == monitor.records
        assert len(again.records) == 2 * len(monitor.summary())


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_optimization_shift_by_hand(norm: str) -> None:
    model = small(norm)
    model[3].p = 0.0
    monitor = OptimizationMonitor(model, cross_entropy, (X, Y), every=1)
    assert monitor.layers == ("0", "4", "6")
    before = copy.deepcopy(model)
    train(model, [monitor], 1)
    first, second, third = monitor.records

    def gradient(updated: list[int], layer: int) -> Tensor:
        mixed = copy.deepcopy(before)
        for index in updated:
            mixed[index].load_state_dict(model[index].state_dict())
        mixed.zero_grad()
        cross_entropy(mixed, (X, Y)).backward()
        return torch.cat([p.grad.flatten() for p in mixed[layer].parameters()]).double()

    assert (first.layer, first.shift, first.relative) == ("0", 0, 0)
    assert first.cosine == pytest.approx(1)
    for record, layer, updated in ((second, 4, [0, 1]), (third, 6, [0, 1, 4])):
        g, h = gradient([], layer), gradient(updated, layer)
        assert record.gradient == pytest.approx(float(g.norm()), rel=1e-4)
        assert record.shift == pytest.approx(float((g - h).norm()), rel=1e-3)
        assert record.relative == pytest.approx(record.shift / record.gradient)
        assert record.cosine == pytest.approx(float(nn.functional.cosine_similarity(g, h, dim=0)), rel=1e-4)
        assert record.shift > 0


def test_optimization_layers_are_ordered_by_their_calls_and_may_be_chosen() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(3, 3)
            self.first = nn.Linear(3, 3)
            self.tied = self.first
            self.norm = nn.LayerNorm(3)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.tied(self.first(x))))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum() * 0

    model, x = Reversed(), torch.randn(4, 3)
    monitor = OptimizationMonitor(torch.compile(model, backend="eager"), loss, x, every=1)
    assert monitor.layers == ("first", "second")
    assert (
        OptimizationMonitor(model, loss, x, "norm").layers
        == ("norm",)
        == OptimizationMonitor(model, loss, x, model.norm).layers
    )
    monitor.start()
    records = monitor.step()
    assert all(math.isnan(r.relative) and math.isnan(r.cosine) and r.shift == 0 for r in records)
    with pytest.raises(ValueError, match="those that do: first, norm, second"):
        OptimizationMonitor(model, loss, x, "unused")
