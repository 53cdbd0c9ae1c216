"""From a layer's output to points: which rows."""

from __future__ import annotations

import torch

from flexnorm.probe import take_points
from flexnorm.probe.forward import chosen_rows


def test_positions_and_images() -> None:
    output = torch.arange(24.0).reshape(2, 3, 2, 2)
    positions = take_points(output, 1, "position")
    assert torch.equal(positions, output.movedim(1, -1).reshape(8, 3))
    assert torch.equal(take_points(output.movedim(1, -1), -1, "position"), positions)
    assert torch.equal(take_points(output, 1, "image"), output.flatten(1))
    assert take_points(output.half(), 1, "image").dtype == torch.float32
    output.zero_()
    assert positions.any(), "a copy"


def test_a_subset_is_fixed_by_layer_seed_and_number() -> None:
    output = torch.randn(40, 3, 5)
    state = torch.get_rng_state()
    few = take_points(output, 1, "position", limit=16, layer="a", seed=1)
    assert few.shape == (16, 3)
    assert torch.equal(few, take_points(output.clone(), 1, "position", limit=16, layer="a", seed=1))
    assert not torch.equal(few, take_points(output, 1, "position", limit=16, layer="b", seed=1))
    assert not torch.equal(few, take_points(output, 1, "position", limit=16, layer="a", seed=2))
    assert torch.equal(state, torch.get_rng_state())
    assert chosen_rows(5, 9, "a", 0).tolist() == list(range(5))
    rows = chosen_rows(100, 10, "a", 0)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == 10
