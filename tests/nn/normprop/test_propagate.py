"""The propagation report: predictions, measurements, and leaving the model as it was."""

import json

import pytest
import torch
from torch import nn

from flexnorm.nn.normprop import (
    NormPropConv2d,
    NormPropLinear,
    NormPropResidual,
    canonical_error,
    coherence_penalty,
    propagate,
)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def chain(depth=4, width=256, **kwargs):
    torch.manual_seed(0)
    return nn.Sequential(*[NormPropLinear(width, width, **kwargs) for _ in range(depth)])


def test_predictions_of_the_stable_network():
    report = propagate(chain())
    assert len(report) == 4
    for i, layer in enumerate(report):
        assert layer.chi == pytest.approx(0.805, abs=0.005)
        assert layer.cumulative_chi == pytest.approx(layer.chi ** (i + 1), rel=1e-5)
        assert layer.jacobian_gain == pytest.approx(1.25, abs=0.01)
        assert layer.predicted_mean == pytest.approx(0, abs=1e-5)
        assert layer.predicted_var == pytest.approx(1, abs=1e-4)
        assert layer.measured_mean is None
    assert "cum. chi" in str(report)
    assert "measured" not in str(report)
    assert json.loads(json.dumps(report.asdicts()))[0]["units"] == 256


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_measured_values_match_the_predictions_on_gaussian_input(activation):
    torch.manual_seed(0)
    net = nn.Sequential(
        NormPropConv2d(8, 64, 3, padding=1, padding_mode="circular", activation=activation),
        NormPropResidual(NormPropConv2d(64, 64, 3, padding=1, border="exact", activation=activation)),
    )
    report = propagate(net, gaussian(64, 8, 8, 8))
    assert [layer.name for layer in report] == ["0", "1.branch"]
    for layer in report:
        assert layer.measured_mean == pytest.approx(layer.predicted_mean, abs=0.05)
        assert layer.measured_var == pytest.approx(layer.predicted_var, rel=0.06)
        assert layer.measured_chi == pytest.approx(layer.chi, rel=0.05)
        assert layer.measured_jacobian_gain == pytest.approx(layer.jacobian_gain, rel=0.05)
        assert layer.input_var == pytest.approx(1, rel=0.06)
        assert abs(layer.input_kurtosis) < 0.2
    assert "var*" in str(report)


def test_drift_shows_as_a_gap_that_the_conditional_prediction_closes():
    last = propagate(chain(9, 512, constants="paper"), gaussian(512, 512))[8]
    assert last.predicted_var == pytest.approx(0.682, abs=0.01)
    assert last.measured_var < 0.3
    assert last.conditional_var == pytest.approx(last.measured_var, rel=0.05)
    assert last.conditional_mean == pytest.approx(last.measured_mean, abs=0.02)
    assert last.input_var < 0.15


def test_non_gaussian_input_shows_in_kurtosis():
    net = NormPropLinear(256, 64)
    net.weight.data.zero_()[:, 0] = 1.0
    x = torch.empty(4096, 256).exponential_(generator=torch.Generator().manual_seed(0)) - 1
    layer = propagate(net, x)[0]
    assert layer.input_skewness == pytest.approx(2, abs=0.3)
    assert layer.input_kurtosis > 3
    assert abs(layer.conditional_var - layer.measured_var) > 0.1


def test_unitized_layers():
    layer = propagate(chain(1, 256, unitize=True), 5 * gaussian(256, 256))[0]
    assert layer.chi == 0
    assert layer.measured_chi == pytest.approx(0, abs=1e-3)
    assert layer.input_var == pytest.approx(1, rel=0.05)
    # Of a direction of 256 dimensions, a unitized layer loses one; the rest shrinks with the length of the sample.
    assert layer.measured_jacobian_gain == pytest.approx(layer.jacobian_gain / 25, rel=0.1)


def test_shared_layers_are_listed_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = NormPropLinear(16, 16)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x, scale):
            return self.dropout(self.layer(self.layer(x) * scale))

    model = Twice()
    model.layer.eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    report = propagate(model, (gaussian(8, 16), 1.0))
    assert [layer.name for layer in report] == ["layer", "layer#2"]
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.layer._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_failure_of_the_model_leaves_it_clean():
    model = nn.Sequential(NormPropLinear(4, 4), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        propagate(model, torch.zeros(2, 4))
    assert model.training
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="no NormProp layer"):
        propagate(nn.Linear(2, 2))


def test_canonical_error_and_its_bound():
    torch.manual_seed(0)
    layer = NormPropLinear(32, 16, dtype=torch.float64)
    x = gaussian(200_000, 32).double()
    with torch.no_grad():
        z = x @ layer.unit_rows().T
    covariance = z.T @ z / len(z)
    error = canonical_error(layer)
    off = covariance - torch.diag(covariance.diagonal())
    assert error.error == pytest.approx(float(off.norm()), rel=0.03)
    assert error.error <= error.bound
    cosines = layer.unit_rows() @ layer.unit_rows().T - torch.eye(16)
    assert error.coherence == pytest.approx(cosines.abs().max().item())
    assert error.bound == pytest.approx(error.coherence * (16 * 15) ** 0.5)


def test_orthogonal_and_grouped_filters():
    layer = NormPropLinear(16, 16)
    nn.init.orthogonal_(layer.weight)
    assert canonical_error(layer).error < 1e-5
    depthwise = NormPropConv2d(8, 8, 3, groups=8)
    assert canonical_error(depthwise) == (0.0, 0.0, 0.0)
    assert coherence_penalty(depthwise).item() == 0.0
    grouped = NormPropConv2d(8, 8, 3, groups=2)
    rows = grouped.unit_rows()
    expected = max((rows[i] @ rows[j]).abs().item() for i in range(8) for j in range(i) if i // 4 == j // 4)
    assert canonical_error(grouped).coherence == pytest.approx(expected, abs=1e-6)


def test_coherence_penalty_pushes_filters_apart():
    torch.manual_seed(0)
    net = nn.Sequential(NormPropLinear(32, 16), NormPropLinear(16, 16, None))
    before = coherence_penalty(net).item()
    assert before == pytest.approx((1 / 32 + 1 / 16) / 2, rel=0.2)
    optimizer = torch.optim.SGD(net.parameters(), lr=20.0)
    for _ in range(50):
        optimizer.zero_grad()
        coherence_penalty(net).backward()
        optimizer.step()
    assert coherence_penalty(net).item() < 0.05 * before
