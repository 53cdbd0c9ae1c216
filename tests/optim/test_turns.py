"""The regularizer by turns: every k-th step of a weight at k-fold strength, the work spread evenly over the steps."""

import copy

import pytest
import torch
from sphere_cases import PAIRS, drive, gradients, parameters
from torch import nn

from flexnorm.optim import SGDG, SphereMonitor, batches

CLASSES = [cls for cls, _ in PAIRS.values()]
both = pytest.mark.parametrize("cls", CLASSES)


@pytest.fixture
def strengths(monkeypatch):
    """By step what the regularizer's strength was for which weight, as (index of the weight, strength)."""
    seen = []
    take = batches.take_step

    def told(params, grads, state, rotation, options, *args):
        seen[-1] += [(id(p), options.ortho) for p in params]
        take(params, grads, state, rotation, options, *args)

    monkeypatch.setattr("flexnorm.optim.base.take_step", told)

    def watch(optimizer, params, steps, start=0, present=lambda step, i: True):
        rows = []
        for step in range(start, start + steps):
            for i, (p, g) in enumerate(zip(params, gradients(params, step), strict=True)):
                p.grad = g if present(step, i) else None
            seen.append([])
            optimizer.step()
            found = dict(seen[-1])
            rows.append([found.get(id(p)) for p in params])
        return rows

    return watch


@both
def test_each_weight_gets_it_every_kth_step_at_kfold_strength_and_the_work_is_spread(cls, strengths):
    params = parameters([(4, 9), (4, 9), (8, 40), (4, 9), (4, 9)])
    rows = strengths(cls(params, lr=0.1, ortho=0.5, ortho_every=3), params, 9)
    for i in range(len(params)):
        column = [row[i] for row in rows]
        assert sorted(column[:3]) == [0.0, 0.0, 1.5]
        assert column == 3 * column[:3]
    # The large weight has a step of its own, the others share what is left.
    assert [sum(s > 0 for s in row) for row in rows[:3]] == [1, 2, 2]
    assert rows[0][2] == 1.5


@both
def test_the_papers_form_keeps_no_state_for_it(cls, strengths):
    params = parameters([(4, 9), (3, 5)])
    optimizer = cls(params, lr=0.1, ortho_every=1)
    assert strengths(optimizer, params, 3) == 3 * [[0.1, 0.1]]
    assert all("ortho_wait" not in state for state in optimizer.state.values())
    off = cls(params, lr=0.1, ortho=0.0)
    assert strengths(off, params, 2) == 2 * [[0.0, 0.0]]
    assert all("ortho_wait" not in state for state in off.state.values())


@both
def test_turns_are_counted_in_steps_of_the_weight(cls, strengths):
    """Gradients that are missing by turns would else miss the regularizer for good."""
    params = parameters([(4, 9), (4, 9)])
    rows = strengths(cls(params, lr=0.1, ortho_every=2), params, 8, present=lambda step, i: i == 1 or step % 2 == 0)
    assert [row[0] for row in rows] == [0.2, None, 0.0, None, 0.2, None, 0.0, None]
    assert [row[1] for row in rows] == [0.0, 0.2] * 4


@both
def test_weights_that_join_late_take_the_steps_that_are_free(cls, strengths):
    params = parameters([(4, 9)] * 3)
    rows = strengths(cls(params, lr=0.1, ortho=1.0, ortho_every=3), params, 6, present=lambda step, i: i < 2 or step)
    assert [[s for s in row if s is not None].index(3.0) for row in rows] == [0, 1, 2, 0, 1, 2]


@both
def test_another_number_on_the_way(cls, strengths):
    params = parameters([(4, 9)] * 6)
    optimizer = cls(params, lr=0.1, ortho_every=6)
    strengths(optimizer, params, 2)
    optimizer.param_groups[0]["ortho_every"] = 2
    rows = strengths(optimizer, params, 4, start=2)
    for i in range(6):
        assert sorted(row[i] for row in rows[:2]) == sorted(row[i] for row in rows[2:]) == [0.0, 0.2]
    optimizer.param_groups[0]["ortho_every"] = 1
    assert strengths(optimizer, params, 1, start=6) == [[0.1] * 6]


@both
@pytest.mark.parametrize("stop", range(1, 5))
def test_continued_from_a_file_in_any_phase_it_is_uninterrupted_to_the_bit(cls, foreach, stop, tmp_path):
    def start():
        params = parameters()
        groups = [{"params": params[:4]}, {"params": params[4:], "ortho_every": 3}]
        return params, cls(groups, lr=0.1, ortho_every=4, foreach=foreach)

    straight, optimizer = start()
    drive(optimizer, straight, 9)
    first, optimizer = start()
    drive(optimizer, first, stop)
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in first]}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second, resumed = start()
    for p, q in zip(second, loaded["params"], strict=True):
        p.data = q
    resumed.load_state_dict(loaded["optimizer"])
    drive(resumed, second, 9 - stop, start=stop)
    assert all(torch.equal(p, q) for p, q in zip(straight, second, strict=True))
    assert all(optimizer.state[p]["ortho_wait"] in range(4) for p in first)


@both
def test_a_state_without_the_key_goes_on_in_the_papers_form(cls):
    params, others = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    old = cls(params, lr=0.1, ortho_every=1)
    drive(old, params, 3)
    state = copy.deepcopy(old.state_dict())
    del state["param_groups"][0]["ortho_every"]
    new = cls(others, lr=0.1)
    assert new.param_groups[0]["ortho_every"] > 1
    new.load_state_dict(state)
    for p, q in zip(others, params, strict=True):
        p.data = q.detach().clone()
    drive(old, params, 5, start=3)
    drive(new, others, 5, start=3)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@both
def test_a_monitor_sees_every_weight_in_every_step_and_changes_nothing(cls):
    params, others = parameters(), parameters()
    watched, plain = cls(params, lr=0.1), cls(others, lr=0.1)
    counts, listen = [], SphereMonitor._listen
    with SphereMonitor(watched) as monitor:
        watched.observer = lambda view: (counts.append(view.param), listen(monitor, view))
        drive(watched, params, 5)
        stats = monitor.stats()
    drive(plain, others, 5)
    assert len(counts) == 5 * len(params)
    assert len(stats) == len(params)
    assert all(view.options.ortho == 0.1 for view in monitor._last.values())  # what the group says
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@both
def test_plans_of_all_phases_are_kept(cls):
    params = parameters([(2, 3)] * 40)
    optimizer = cls(params, lr=0.1, ortho_every=32)
    drive(optimizer, params, 33)
    plans = list(optimizer._workspace._plans.values())
    drive(optimizer, params, 32, start=33)
    assert list(optimizer._workspace._plans.values()) == plans


@both
def test_kfold_strength_is_bounded_by_the_clip(cls):
    """No row walks further in one step than without the regularizer's turn."""
    p = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]], dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    optimizer, seen = cls([p], lr=1.0, ortho_every=8, grad_clip=0.01), []
    optimizer.observer = seen.append
    optimizer.step()
    once = 2 * 0.1 * 0.8 * 0.6  # of either row, the tangent part of 2 alpha (Y Y^T - I) Y
    torch.testing.assert_close(seen[0].tangent_norm, torch.full((2,), 8 * once, dtype=torch.float64))
    if cls is SGDG:
        torch.testing.assert_close(seen[0].angle, torch.full((2,), 0.01, dtype=torch.float64))


@pytest.mark.parametrize(("every", "stable"), [(1, True), (4, True), (6, True), (8, False)])
def test_rows_come_to_rest_as_fast_by_turns_up_to_a_number_of_steps(every, stable):
    """With the paper's numbers deviations decay as the root of the momentum per step, as docs/optim.md says."""
    start = 1e-3
    p = nn.Parameter(torch.tensor([[1.0, 0.0, 0.0], [start, 1.0, 0.0]], dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    optimizer = SGDG([p], lr=0.2, momentum=0.9, ortho=0.1, ortho_every=every, grad_clip=None)
    seen = []
    for _ in range(96):
        optimizer.step()
        seen.append(abs(float((p[0] @ p[1]).detach())))
    bound = (1 + 0.9 ** (every / 2)) ** 2
    assert (every * (1 - 0.9**every) / (1 - 0.9) * 4 * 0.1 * 0.2 < bound) == stable
    assert (max(seen[48:]) < 3 * start * 0.9**24) == stable
