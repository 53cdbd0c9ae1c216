"""Monitors of padded probes: points are the positions that count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flexnorm.nn as fx
from flexnorm.shift import ShiftMonitor


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(3, 4), fx.LayerNorm(4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.norm(self.linear(x))


MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("samples", ["position", "image"])
@pytest.mark.parametrize("how", ["name", "tensor", "layers"])
def test_points_are_the_positions_that_count(how: str, samples: str) -> None:
    model, x = Padded(), torch.randn(3, 4, 3)
    mask = {"name": "attention_mask", "tensor": MASK, "layers": {"norm": lambda probe: probe["attention_mask"]}}[how]
    probe = {"x": x, "attention_mask": MASK}
    monitor = ShiftMonitor(model, probe, every=1, mask=mask, samples=samples, metrics=["moments", "noise"])
    y = model(x).detach()
    points = monitor.look()["norm"]
    expected = y[MASK > 0] if samples == "position" else (y * MASK.unsqueeze(-1)).flatten(1)[:2]
    torch.testing.assert_close(points, expected)
    moments = monitor._numbers["norm"]
    assert moments["variance"] == pytest.approx(float(y[MASK > 0].var(0, correction=0).mean()), rel=1e-5)


def test_what_the_mask_hides_does_not_shift() -> None:
    model, x = Padded(), torch.randn(3, 4, 3)
    hidden = torch.where(MASK.unsqueeze(-1) > 0, x, 1e3)
    records = []
    for inputs in (x, hidden):
        changed = Padded()
        with ShiftMonitor(changed, {"x": inputs, "attention_mask": MASK}, every=1, mask="attention_mask") as monitor:
            with torch.no_grad():
                changed.linear.weight.mul_(1.1).add_(0.1)
            monitor.step()
        records += monitor.records
    assert len(records) == 2
    assert records[0].w1 == pytest.approx(records[1].w1, rel=1e-6)
    assert records[0].w1 > 0
    with pytest.raises(ValueError, match="leaves no point of layer norm"):
        ShiftMonitor(model, x, every=1, mask=torch.zeros(3, 4)).look()
