"""What the monitor says about a step, against the step itself."""

import pytest
import torch
from sphere_cases import PAIRS, drive, parameters
from torch import nn

from flexnorm.optim import SGDG, SphereMonitor
from flexnorm.optim.manifold import angle, coherence


@pytest.mark.parametrize("name", PAIRS)
def test_angles_are_those_that_were_walked(name, foreach):
    params = parameters(dtype=torch.float64)
    optimizer = PAIRS[name][0](params, lr=0.05, foreach=foreach)
    drive(optimizer, params, 3)
    before = [p.detach().clone() for p in params]
    with SphereMonitor(optimizer) as monitor:
        drive(optimizer, params, 1, start=3)
    assert list(monitor.stats()) != []
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        walked = angle(old.flatten(1), p.detach().flatten(1))
        stats = monitor.stats()[str(i)]
        assert stats.angle_max == pytest.approx(float(walked.max()), rel=1e-9)
        assert stats.angle_mean == pytest.approx(float(walked.mean()), rel=1e-9)
        assert (stats.coherence_mean, stats.coherence_max) == coherence(p.flatten(1))
        assert set(stats.asdict()) >= {"tangent_norm", "clipped"}


def test_share_of_clipped_rows_and_tangent_norm():
    p = nn.Parameter(torch.eye(4, 5))
    p.grad = torch.zeros(4, 5)
    p.grad[:, 4] = torch.tensor([0.0, 0.05, 0.2, 0.55])
    optimizer = SGDG([p], lr=0.1, ortho=0.0)
    with SphereMonitor(optimizer, [("layer.weight", p)]) as monitor:
        optimizer.step()
    stats = monitor.stats()["layer.weight"]
    assert stats.clipped == 0.5
    assert stats.tangent_norm == pytest.approx(0.2)
    optimizer.param_groups[0]["grad_clip"] = None
    with monitor:
        optimizer.step()
    assert monitor.stats()["layer.weight"].clipped == 0.0


def test_watching_changes_nothing():
    results = []
    for watch in (True, False):
        params = parameters()
        optimizer = SGDG(params, lr=0.1)
        if watch:
            with SphereMonitor(optimizer):
                drive(optimizer, params, 5)
        else:
            drive(optimizer, params, 5)
        assert optimizer.observer is None
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_misuse():
    params = parameters([(2, 3)])
    with pytest.raises(TypeError, match="not to SGD"):
        SphereMonitor(torch.optim.SGD(params, lr=0.1))
    optimizer = SGDG(params, lr=0.1)
    with SphereMonitor(optimizer), pytest.raises(RuntimeError, match="watched already"), SphereMonitor(optimizer):
        pass
