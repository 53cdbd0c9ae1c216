"""What decides how weights move: plans, batches, the corrections of their age, and rows out of the usual range."""

import math

import pytest
import torch
from sphere_cases import drive, parameters
from torch import nn

from flexnorm.optim import SGDG, AdamG, ReferenceAdamG, batches, step
from flexnorm.optim.batches import State, take_step
from flexnorm.optim.rows import RowLayout
from flexnorm.optim.step import Rotation, StepOptions, rotate_

PAPER = StepOptions(grad_clip=0.1, ortho=0.1)


def plan(shapes, dtype=torch.float32, **options):
    params = parameters(shapes, dtype)
    made = batches._plan(params, State(), StepOptions(**{"grad_clip": 0.1, "ortho": 0.0, **options}))
    return [[job.index for job in batch.jobs] for batch in made.batches]


def test_options_are_read_from_a_group():
    group = SGDG(parameters([(4, 3)]), lr=0.1, ortho=0.3, grad_clip=None, maximize=True, foreach=False).param_groups[0]
    assert StepOptions.of(group) == StepOptions(None, 0.3, maximize=True, foreach=False)


def test_what_moves_together(torch_only):
    shapes = [(4, 9), (2, 9), (4, 3, 3), (5, 8), (0, 9)]
    assert plan(shapes) == [[0, 1, 2], [3]]  # of one row length
    assert plan(shapes, ortho=0.1) == [[0, 2], [1], [3]]  # and of one block height
    assert plan([(4, 9), (2, 9), (4, 9)], ortho=0.1, row_groups=2) == [[0, 2], [1]]
    assert plan(shapes, foreach=False) == [[0], [1], [2], [3]]
    assert plan(shapes, foreach=False, compile=True) == plan(shapes)
    assert plan([(300, 1000), (300, 1000), (1, 1000)]) == [[0], [1, 2]]  # no more than fits the cache


def test_what_moves_together_in_c(monkeypatch):
    monkeypatch.setattr(batches.sphere, "load", dict)
    monkeypatch.setattr(batches.sphere, "Rows", lambda *_: object())
    shapes = [(4, 9), (5, 8), (300, 1000), (300, 1000)]
    assert plan(shapes) == [[0, 1, 2, 3]]
    assert plan(shapes, ortho=0.1) == [[0], [1], [2], [3]]
    assert plan(shapes, row_dim=1) == [[0], [1], [2], [3]]
    assert plan(shapes, torch.bfloat16) == [[0], [1], [2], [3]]


def job(weight, moment=None, second=None, count=None):
    return batches.Job(0, RowLayout.of(weight), weight, moment, second, count)


def test_what_c_takes():
    w, last = torch.randn(6, 4, 3, 3), {"memory_format": torch.channels_last}
    assert job(w).suits_c()
    assert job(w.to(**last)).suits_c()
    assert job(w, torch.zeros_like(w), torch.zeros(6), torch.tensor(0.0)).suits_c()
    assert not job(w.bfloat16()).suits_c()
    assert not job(w.transpose(0, 1)).suits_c()
    assert not job(torch.stack([w, w], dim=-1)[..., 0]).suits_c()
    assert not job(w, torch.zeros_like(w).to(**last)).suits_c()
    assert not job(w, w.double()).suits_c()
    assert not job(w, w, torch.zeros(12)[::2]).suits_c()
    assert not job(w, w, torch.zeros(6), torch.tensor(0.0, dtype=torch.float64)).suits_c()


def test_a_gradient_in_the_dtype_and_order_of_its_weight():
    w = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    same, other = torch.ones_like(w), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    assert batches._conforming(same, w) is same
    got = batches._conforming(other, w)
    assert (got.dtype, got.stride()) == (w.dtype, w.stride())
    torch.testing.assert_close(got, other.float(), rtol=0, atol=0)


def test_parts_are_as_large_as_allowed():
    jobs = [job(torch.zeros(2, n)) for n in (5, 5, 5, 50, 1, 1)]
    assert [len(part) for part in batches._parts(jobs, 20)] == [2, 1, 1, 2]
    assert [len(part) for part in batches._parts(jobs, math.inf)] == [6]


@pytest.mark.parametrize("path", [{}, {"foreach": False}, {"compile": True}])
def test_weights_of_different_age_in_one_batch(path, torch_only, untraced):
    params = parameters([(4, 9), (4, 9), (2, 3, 3)], torch.float64)
    optimizer = AdamG(params, lr=0.05, ortho=0.0, **path)
    references = [ReferenceAdamG([p.flatten(1)], lr=0.05, ortho=0.0) for p in params]
    for k in range(6):
        for i, (p, reference) in enumerate(zip(params, references, strict=True)):
            p.grad = None if k < 2 * i else torch.full_like(p, 0.01 * (k + 1)).cumsum(1)
            if p.grad is not None:
                reference.step([p.grad.flatten(1)])
        optimizer.step()
    for p, reference in zip(params, references, strict=True):
        torch.testing.assert_close(p.detach().flatten(1), reference.weights[0], rtol=0, atol=1e-13)


def test_chunks_of_rows_change_nothing(torch_only, monkeypatch):
    results = []
    for size in (1 << 19, 20):
        monkeypatch.setattr(step, "chunk_size", lambda _, size=size: size)
        params = parameters([(7, 9), (5, 9)], torch.float64)
        optimizer = AdamG(params, lr=0.05, ortho=0.0)
        drive(optimizer, params[:1], 1)
        drive(optimizer, params, 3, start=1)  # the second weight is younger: its rows are corrected by other factors
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rows_of_any_length_are_directions(size, torch_only):
    a, b = parameters([(3, 5)])[0].detach(), parameters([(3, 5)])[0].detach() * size
    for p in (a, b):
        take_step([p], [torch.ones(3, 5)], State([torch.zeros(3, 5)]), Rotation(-0.1, 0.9, 0.9), PAPER)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("scale", [0.5, 3.0, -2.0])  # within and beyond a quarter circle
def test_rotation_by_hand(traced, scale):
    p, m = torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    theta, norm = rotate_(p, torch.zeros_like(p), m, None, Rotation(1.0, scale, 0.9), None, traced)
    c, s = math.cos(scale), math.sin(scale)
    torch.testing.assert_close(p, torch.tensor([[c, s]], dtype=torch.float64))
    torch.testing.assert_close(m, 0.9 * torch.tensor([[-s, c]], dtype=torch.float64))
    assert (float(theta), float(norm)) == (scale, 0.0)


def test_a_plan_is_kept_and_buffers_grow():
    workspace = batches.Workspace()
    plans = [workspace.plan(("a",), lambda: batches.Plan([], [])) for _ in range(2)]
    assert plans[0] is plans[1]
    cpu = torch.device("cpu")
    small = workspace.take("m", (2, 3), cpu, torch.float32)
    assert workspace.take("m", (1, 3), cpu, torch.float32).data_ptr() == small.data_ptr()
    assert workspace.take("m", (4, 3), cpu, torch.float32).shape == (4, 3)


def test_subclasses_with_their_own_constructor():
    class Mine(SGDG):
        def __init__(self, params):
            super().__init__(params, lr=0.3, ortho=0.0)

    optimizer = Mine([nn.Parameter(torch.eye(2))])
    assert optimizer.param_groups[0].keys() == SGDG([nn.Parameter(torch.eye(2))], lr=1.0).param_groups[0].keys()
    state = optimizer.state_dict()
    del state["param_groups"][0]["compile"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["compile"] is False


def test_the_correction_for_moments_that_start_at_zero():
    rotation = Rotation(1.0, 1.0, 0.9, beta1=0.9, beta2=0.99)
    assert rotation.correction(1) == pytest.approx(0.1 / 0.1)
    assert rotation.correction(10_000) == pytest.approx(1.0)
