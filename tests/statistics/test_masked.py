"""Statistics of padded batches are those of the values that count alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexnorm.nn as fx
from flexnorm.engine import Pool
from flexnorm.statistics import PopulationEstimator, accumulate, estimate_population, recalibrate


class Encoder(nn.Module):
    """Tokens (B, T, 4) through two norms; the pooled output through a third. Only ours are given the mask."""

    def __init__(self, norm: str = "batch", *, give: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.norm1, self.norm2 = (fx.make_norm(norm, 5, channel_axis=-1, **options) for _ in range(2))
        self.pooled = nn.BatchNorm1d(5)
        self.give = give

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        masks = (attention_mask,) if self.give else ()
        h = self.norm1(self.first(x), *masks).relu()
        h = self.norm2(self.second(h), *masks)
        keep = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        return self.pooled((h * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True).clamp_min(1))


def batches(*lengths: list[int]) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    made = []
    for own in lengths:
        mask = (torch.arange(max(own)) < torch.tensor(own)[:, None]).long()
        x = torch.where(mask.unsqueeze(-1) > 0, torch.randn(len(own), max(own), 4), 7.0)
        made.append({"x": x, "attention_mask": mask})
    return made


def counted(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask > 0]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("how", ["name", "function", "layers", "given"])
def test_recalibration_sees_what_counts_alone(how: str, sequential: bool) -> None:
    model = Encoder(give=how == "given")
    data = batches([3, 6, 1], [2, 4], [5])
    mask: Any = {
        "name": "attention_mask",
        "function": lambda batch: batch["attention_mask"],
        "layers": {"norm?": "attention_mask", "pooled": None},
        "given": None,
    }[how]
    recalibrate(model, data, mask=mask, sequential=sequential)
    seen = torch.cat([counted(model.first(b["x"]), b["attention_mask"]) for b in data]).double()
    torch.testing.assert_close(model.norm1.running_mean, seen.mean(0).float())
    torch.testing.assert_close(model.norm1.running_var, seen.var(0).float())
    # The second norm's input depends on what the first normalizes by while the data is collected.
    inputs = []
    for b in data:
        h = model.first(b["x"])
        rows = counted(h, b["attention_mask"]) if not sequential else seen
        mean, var = rows.mean(0), rows.var(0, correction=1 if sequential else 0)
        h = ((h - mean.float()) / (var.float() + 1e-5).sqrt()).relu()
        inputs.append(counted(model.second(h), b["attention_mask"]))
    torch.testing.assert_close(model.norm2.running_mean, torch.cat(inputs).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.norm2.running_var, torch.cat(inputs).var(0), atol=1e-5, rtol=1e-4)


def test_layers_of_torch_with_channels_on_axis_one_and_rows() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    data = batches([3, 6, 1], [2, 4])
    expected = torch.cat([counted(b["x"], b["attention_mask"]) for b in data])

    def axis_one(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return m(b["x"].mT)

    def rows(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return m(b["x"].flatten(0, 1))

    for forward in (axis_one, rows):
        recalibrate(model, data, mask="attention_mask", forward=forward)
        torch.testing.assert_close(model[0].running_mean, expected.mean(0))
        torch.testing.assert_close(model[0].running_var, expected.var(0))
    holders = [SimpleNamespace(**b) for b in data]  # batches of graphs have attributes
    recalibrate(model, holders, mask="attention_mask", forward=axis_one_of_attributes)
    torch.testing.assert_close(model[0].running_var, expected.var(0))
    pairs = [(b, 0) for b in data]
    recalibrate(model, pairs, mask="attention_mask", forward=lambda m, b: axis_one(m, b[0]))
    torch.testing.assert_close(model[0].running_var, expected.var(0))


def axis_one_of_attributes(model: nn.Module, batch: SimpleNamespace) -> Tensor:
    return model(batch.x.mT)


def test_masks_that_do_not_fit_are_named() -> None:
    data = batches([3, 6, 1])
    with pytest.raises(ValueError, match=r"norm1, whose activation has shape \(3, 6\)"):
        recalibrate(Encoder(), data, mask=lambda b: b["attention_mask"][:, :4])
    with pytest.raises(ValueError, match="with the entries x, attention_mask, has no 'mask'"):
        recalibrate(Encoder(), data, mask="mask")
    with pytest.raises(TypeError, match="got int"):
        recalibrate(Encoder(), data, mask=3)
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        recalibrate(Encoder(), data, mask=lambda b: b["attention_mask"].tolist())
    with pytest.raises(ValueError, match="no_such"):
        recalibrate(Encoder(), data, mask={"no_such": "attention_mask"})


def test_batches_of_padding_alone_change_nothing() -> None:
    data = batches([3, 6, 1], [2, 4])
    padding = {"x": torch.full((2, 3, 4), float("nan")), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    one, two = Encoder(), Encoder()
    options = {"mask": {"norm?": "attention_mask"}, "include": "norm?"}
    recalibrate(one, data, **options)
    recalibrate(two, [*data, padding], **options)
    torch.testing.assert_close(two.state_dict(), one.state_dict())
    before = copy.deepcopy(one.state_dict())
    recalibrate(one, [padding], **options)
    torch.testing.assert_close(one.state_dict(), before)


def test_instances_of_padded_batches_and_of_segments() -> None:
    data = batches([3, 6, 1], [2, 4])
    model = nn.Sequential(fx.InstanceNorm1d(4, channel_axis=-1, track_running_stats=True))
    recalibrate(model, data, mask="attention_mask", forward=lambda m, b: m(b["x"]))
    graphs = [x[m > 0] for b in data for x, m in zip(b["x"], b["attention_mask"], strict=True)]
    mean = torch.stack([g.mean(0) for g in graphs]).mean(0)
    var = torch.stack([g.var(0) if len(g) > 1 else g[0] * 0 for g in graphs]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, var)
    index = torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor([len(g) for g in graphs]))
    again = nn.Sequential(fx.InstanceNorm1d(4, track_running_stats=True))
    recalibrate(again, [(torch.cat(graphs), index)], forward=lambda m, b: m[0](b[0], segments=b[1]))
    torch.testing.assert_close(again[0].running_mean, mean)
    torch.testing.assert_close(again[0].running_var, var)


@pytest.mark.parametrize("norm", ["batch", "population", "instance"])
def test_accumulation_pools_what_counts(norm: str) -> None:
    options = {"track_running_stats": True} if norm == "instance" else {}
    micro = batches([3, 6, 2], [2, 4], [4])
    padding = {"x": torch.zeros(2, 3, 4), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    model, whole = (Encoder(norm, give=True, momentum=1.0, **options) for _ in range(2))
    with accumulate(model, include="norm1"):
        for batch in (*micro[:2], padding, micro[2]):
            model.norm1(model.first(batch["x"]), batch["attention_mask"])
    rows = [whole.first(b["x"]) for b in micro]
    padded = nn.utils.rnn.pad_sequence([s for r in rows for s in r], batch_first=True)
    keep = nn.utils.rnn.pad_sequence([m for b in micro for m in b["attention_mask"]], batch_first=True)
    whole.norm1(padded, keep)
    torch.testing.assert_close(model.norm1.state_dict(), whole.norm1.state_dict())


def test_population_is_estimated_from_what_counts() -> None:
    (batch,) = batches([3, 6, 2, 4, 1, 6])
    model = Encoder("population", statistics="estimated")
    estimate_population(model, batch, mask="attention_mask")
    seen = counted(model.first(batch["x"]), batch["attention_mask"])
    torch.testing.assert_close(model.norm1.running_mean, seen.mean(0))
    torch.testing.assert_close(model.norm1.running_var, seen.var(0, correction=0))
    parts = Encoder("population", statistics="estimated")
    estimate_population(parts, batch, mask="attention_mask", chunk=2)
    torch.testing.assert_close(parts.norm1.state_dict(), model.norm1.state_dict())
    drawn = Encoder("population", statistics="estimated")
    PopulationEstimator(drawn, batch, mask="attention_mask").renew()
    torch.testing.assert_close(drawn.state_dict(), model.state_dict())


def test_weights_of_a_pool_may_add_up_to_less_than_one() -> None:
    x, weights = torch.randn(5, 3), torch.tensor([0.1, 0.2, 0.0, 0.05, 0.1])
    pool, parts = Pool(3), Pool(3)
    pool.add_values(x, weights)
    for part in (slice(0, 2), slice(2, 5)):
        parts.add_values(x[part], weights[part])
    share = (weights / weights.sum()).double().unsqueeze(1)
    mean = (share * x).sum(0)
    for found in (pool, parts):
        torch.testing.assert_close(found.mean, mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.var, (share * (x - mean).square()).sum(0), atol=1e-6, rtol=1e-6)
