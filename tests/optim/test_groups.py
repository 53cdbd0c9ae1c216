"""Param groups: what goes where, and that the network stays the function it was."""

import copy

import pytest
import torch
from sphere_networks import IMAGES, zoo
from torch import nn

from flexnorm import NothingDone
from flexnorm.nn import UnitizedBatchNorm2d
from flexnorm.optim import SGDG, SGDP, AdamG, AdamP, param_groups, row_axis, scale_invariant_weights
from flexnorm.optim.groups import _followers, _has_history, _scale_statistics
from flexnorm.optim.rows import RowLayout, to_rows
from flexnorm.shift import WeightMonitor


def trained():
    """Return a network with a history: gains, biases and running statistics that are not their initial values."""
    model = zoo()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    for _ in range(40):
        model(torch.randn(32, 3, 10, 10, generator=generator))
    return model


def test_what_goes_where():
    model = zoo()
    groups = param_groups(model, 0.01, 0.2, 5e-4, IMAGES)
    names = {p: name for name, p in model.named_parameters()}
    placed = {names[p]: group for group in groups for p in group["params"]}
    assert set(placed) == set(names.values())
    assert sum(len(g["params"]) for g in groups) == len(names)
    for name, group in placed.items():
        on = name in groups.report.selected
        assert group["manifold"] == on
        assert group["lr"] == (0.2 if on else 0.01)
        weight = dict(model.named_parameters())[name].ndim >= 2
        assert group["weight_decay"] == (5e-4 if weight and not on else 0.0)
    assert (placed["up.weight"]["row_dim"], placed["up.weight"]["row_groups"]) == (1, 2)
    assert placed["depthwise.weight"]["row_groups"] == 12
    assert placed["stem.weight"]["ortho"] == 0.1


def test_more_rows_than_inputs_get_no_regularizer():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.BatchNorm1d(4))
    groups = param_groups(model, 0.1, 0.1, 0.0, torch.zeros(4, 3))
    assert {g["params"][0].shape: g["ortho"] for g in groups if g["manifold"]} == {(8, 3): 0.0, (4, 8): 0.1}


def test_the_function_is_unchanged_in_training_and_in_evaluation():
    model = trained()
    x = torch.randn(16, 3, 10, 10)
    model.dropout.p = 0.0
    before_train, before_eval = model.train()(x), model.eval()(x)
    state = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    groups = param_groups(model, 0.01, 0.2, 5e-4, IMAGES)
    torch.testing.assert_close(model.eval()(x), before_eval, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(model.train()(x), before_train, rtol=1e-3, atol=2e-4)
    assert not torch.equal(model.stem_norm.running_var, state["stem_norm.running_var"])
    assert torch.equal(model.block.norm1.running_var, state["block.norm1.running_var"]) is False  # the forward above
    for group in groups:
        if group["manifold"]:
            for p in group["params"]:
                rows = to_rows(p.detach(), RowLayout.of(p, group["row_dim"], group["row_groups"]))
                torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_fresh_running_statistics_stay_fresh():
    model = zoo()
    param_groups(model, 0.01, 0.2, 0.0, IMAGES)
    assert (model.stem_norm.running_mean == 0).all()
    assert (model.stem_norm.running_var == 1).all()


def test_weights_that_are_not_normalized_right_behind_are_named():
    model = nn.Sequential(nn.Linear(5, 8), nn.Identity(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[1].forward = lambda x: x + 0.0  # the statistics are not those of the very output of the layer
    with torch.no_grad():
        model[0].weight.mul_(3)
    model(torch.randn(16, 5))
    groups = param_groups(model, 0.1, 0.1, 0.0, torch.zeros(4, 5))
    assert "0.weight" in groups.notes[0]
    assert "re-estimate" in groups.notes[0]
    assert "note: 0.weight" in str(groups)


def test_paper_rule_says_that_lengths_mattered():
    model = zoo()
    groups = param_groups(model, 0.01, 0.2, 0.0, select="paper")
    assert any(note.startswith("block.conv2.weight: rows had lengths") for note in groups.notes)


class PreNormBlock(nn.Module):
    """A block of a transformer without attention: the norm stands in front of the linear maps, none reads them."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_nothing_on_the_sphere_is_said_with_the_reasons(cls):
    model = PreNormBlock()
    with pytest.warns(NothingDone, match=r"0 of 2 weights \(up.weight, down.weight: rescaling rows changes") as caught:
        groups = param_groups(model, 0.1, 0.2, 0.1, torch.zeros(4, 4))
    assert [w.filename for w in caught] == [__file__]
    text = str(caught[0].message)
    assert "SGDG moves those by SGD, AdamG by AdamW" in text
    assert groups.notes == [text]
    assert f"note: {text}" in str(groups)
    twin = copy.deepcopy(model)
    theirs = {SGDG: torch.optim.SGD, AdamG: torch.optim.AdamW}[cls]
    rest = {SGDG: {"momentum": 0.9}, AdamG: {}}[cls]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    pairs = [
        (model, cls(groups)),
        (twin, theirs([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], 0.1, weight_decay=0.0, **rest)),
    ]
    x = torch.randn(6, 4)
    for net, optimizer in pairs:
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_weights_that_only_options_keep_off_the_sphere_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5))
    model[2].weight.requires_grad_(False)
    with pytest.warns(NothingDone, match=r"0\.weight: excluded; 2\.weight: does not require a gradient"):
        param_groups(model, 0.1, 0.2, 0.0, torch.zeros(4, 3), exclude="0")
    with pytest.warns(NothingDone, match=r"the model has no weights"):
        param_groups(nn.LayerNorm(4), 0.1, 0.2, 0.0, torch.zeros(4, 4))


def test_zero_rows_stay_and_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].weight[1] = 0
    groups = param_groups(model, 0.1, 0.1, 0.0, torch.zeros(4, 3))
    assert "1 rows are zero" in groups.notes[0]
    assert (model[0].weight[1] == 0).all()


def test_what_a_norm_declares_free_of_decay_has_none():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), UnitizedBatchNorm2d(6), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(2, 3, 5, 5))
    groups = param_groups(model, 0.01, 0.2, 0.1, torch.randn(2, 3, 5, 5), decay_vectors=True)
    decays = {p: g["weight_decay"] for g in groups for p in g["params"] if not g["manifold"]}
    assert decays[model[1].alpha] == 0.0
    assert decays[model[1].weight] == decays[model[3].weight] == 0.1
    assert len(param_groups(model, 0.01, 0.2, 0.1, torch.randn(2, 3, 5, 5))) == 3


def test_options():
    model = zoo()
    model.stem.weight.requires_grad_(False)
    kept = model.up.weight.detach().clone()
    groups = param_groups(
        model,
        0.01,
        0.2,
        0.1,
        IMAGES,
        exclude=["block.*", "linear.weight"],
        normalize=False,
        decay_vectors=True,
        grad_clip=None,
        ortho=0.3,
    )
    on = [p for g in groups if g["manifold"] for p in g["params"]]
    assert len(on) == 3
    assert torch.equal(model.up.weight, kept)
    assert not any(p is model.stem.weight for g in groups for p in g["params"])
    assert all(g["weight_decay"] == 0.1 for g in groups if not g["manifold"])
    assert groups[0]["grad_clip"] is None
    assert {g["ortho"] for g in groups if g["manifold"]} == {0.3}
    with pytest.raises(ValueError, match=r"exclude: unknown parameter or pattern 'nothing\.\*'"):
        param_groups(model, 0.1, 0.1, 0.0, IMAGES, exclude=["nothing.*"])


def test_it_prints_what_went_where(capsys):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), torch.zeros(4, 3)
    groups = param_groups(model, 0.1, 0.2, 0.0, x)
    assert capsys.readouterr().out == ""
    param_groups(model, 0.1, 0.2, 0.0, x, verbose=True)
    out = capsys.readouterr().out
    assert out == f"{groups}\n"
    assert "1 tensors, 12 numbers: lr=0.2" in out
    assert "0.weight  (4, 3)  scale invariant" in out
    assert "2.weight  (2, 4)  rescaling rows changes the output" in out


@pytest.mark.parametrize("make", [SGDG, AdamG, lambda g: torch.optim.SGD(g, momentum=0.9)])
def test_optimizers_take_the_groups_and_learn(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    x = torch.randn(64, 1, 8, 8)
    y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()
    optimizer = make(param_groups(model, 0.05, 0.1, 1e-4, x))
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


def test_statistics_behind_a_layer_are_found_by_what_they_are_given():
    model = zoo()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    found = _followers(model, {model.stem, model.linear, model.head}, norms, IMAGES)
    assert {(id(layer), id(norm)) for layer, norm in found} == {
        (id(model.stem), id(model.stem_norm)),
        (id(model.linear), id(model.linear_norm)),
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_statistics_follow_the_lengths_but_not_the_bias():
    layer, norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
    assert not _has_history(norm)
    norm.running_mean.copy_(torch.tensor([3.0, 5.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    assert _has_history(norm)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, 1.0]))
    _scale_statistics(layer, norm, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(norm.running_mean, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.0, 9 / 16]))


class Conv1D(nn.Module):
    """A linear map as GPT-2 has it, its weight (in, out)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class OwnLinear(nn.Linear):
    """Also with an activation, dropout and a counter: trying must leave no trace."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.nn.functional.dropout(super().forward(x), 0.9, self.training).tanh()


class Switchable(nn.Linear):
    """As peft's linear maps: which axis is which depends on a flag."""

    fan_in_fan_out = True

    def forward(self, x):
        return nn.functional.linear(x, self.weight.T if self.fan_in_fan_out else self.weight)


class Attention(nn.Module):
    """A matrix of a module that does not take one tensor: rows, as in torch's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, query, key):
        return query @ self.weight @ key


class Mixer(nn.Module):
    """A matrix that is neither: the softmax mixes outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return (x @ self.weight).softmax(-1)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Conv1D(6, 4), (1, 1)),
        (Conv1D(6, 6), (1, 1)),
        (Conv1D(6, 4).bfloat16(), (1, 1)),
        (OwnLinear(4, 6), (0, 1)),
        (OwnLinear(6, 6), (0, 1)),
        (Switchable(6, 6), (1, 1)),
        (Attention(), (0, 1)),
        (nn.Embedding(6, 4), (0, 1)),
        (nn.Linear(4, 6), (0, 1)),
        (nn.Conv2d(4, 6, 3, groups=2), (0, 2)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 2)),
        (nn.Bilinear(2, 3, 4), (0, 1)),
    ],
)
def test_where_the_output_units_of_a_layer_are(module: nn.Module, expected: tuple[int, int]) -> None:
    kept, random = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    assert row_axis(module, module.weight) == expected
    assert module.training
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    row_dim, groups = expected
    assert RowLayout.of(module.weight, row_dim, groups).rows == {nn.Bilinear: 4}.get(type(module), 6)


@pytest.mark.parametrize("module", [Mixer(), nn.Linear(4, 6, device="meta"), Conv1D(1, 4)])
def test_a_module_that_cannot_be_understood_has_rows_on_axis_0(module):
    assert row_axis(module, module.weight) == (0, 1)


class Transposed(nn.Linear):
    """The same map as a linear layer, its weight (in, out)."""

    def __init__(self, like):
        super().__init__(like.in_features, like.out_features)
        self.weight = nn.Parameter(like.weight.detach().T.clone())
        self.bias = nn.Parameter(like.bias.detach().clone())

    def forward(self, x):
        return x @ self.weight + self.bias


def twins():
    """A network of linear layers, and one of the same maps that holds every weight as (in, out)."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    other = copy.deepcopy(plain)
    for index in (0, 3):
        other[index] = Transposed(plain[index])
    return plain, other


def test_weights_in_out_are_found_and_say_where_their_rows_are():
    plain, other = (scale_invariant_weights(model, torch.zeros(4, 5)) for model in twins())
    assert plain.selected == other.selected == ["0.weight", "3.weight"]
    reports = [(r.rows, r.n, r.row_dim) for r in (other["0.weight"], other["3.weight"])]
    assert reports == [(8, 5, 1), (8, 8, 1)]


@pytest.mark.parametrize("cls", [SGDG, AdamG, SGDP, AdamP])
def test_weights_in_out_take_the_steps_of_their_twins(cls):
    models, x = twins(), torch.randn(16, 5)
    for model in models:
        model(3 * x)  # a history, so that the statistics must follow the lengths
    before = [model.eval()(x) for model in models]
    optimizers = []
    for model in models:
        groups = param_groups(model.train(), 0.1, 0.1, 0.0, torch.zeros(4, 5))
        extra = {"manifold", "grad_clip", "ortho"} if cls in (SGDP, AdamP) else ()
        optimizers.append(cls([{k: v for k, v in group.items() if k not in extra} for group in groups]))
    for model, old in zip(models, before, strict=True):
        torch.testing.assert_close(model.eval()(x), old, rtol=1e-4, atol=1e-5)
    monitors = [WeightMonitor(model, every=1) for model in models]
    for model, optimizer, monitor in zip(models, optimizers, monitors, strict=True):
        with monitor:
            for _ in range(4):
                optimizer.zero_grad()
                model.train()(x).pow(3).mean().backward()
                optimizer.step()
                monitor.step()
    for index in (0, 3):
        torch.testing.assert_close(models[1][index].weight.T, models[0][index].weight, rtol=1e-4, atol=1e-5)
    for one, two in zip(*(monitor.records for monitor in monitors), strict=True):
        assert two.angle == pytest.approx(one.angle, rel=1e-3, abs=1e-5)
        assert two.norm == pytest.approx(one.norm, rel=1e-4)


def test_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    block = transformers.GPT2LMHeadModel(config).transformer.h[0]
    found = {
        name: row_axis(m, m.weight)[0] for name, m in block.named_modules() if getattr(m, "weight", None) is not None
    }
    assert {name for name, axis in found.items() if axis} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


class Attention(nn.Module):
    """Query and key normalized head by head; the output of the block by a norm of its own."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(12, 12, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).view(*x.shape[:-1], 3, 4).transpose(-2, -3) for layer in (self.query, self.key, self.value))
        q, k = (nn.functional.rms_norm(t, (4,), eps=1e-30) for t in (q, k))
        y = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return x + nn.functional.rms_norm(y, (12,), eps=1e-30)


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_heads_and_matrices_go_on_spheres_of_their_own(cls):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(4, 6, 12)
    with pytest.warns(NothingDone, match="spheres='matrices' takes 4 as heads or matrices"):
        param_groups(model, 0.1, 0.1, 0.0, x)
    on = [g for g in param_groups(copy.deepcopy(model), 0.1, 0.1, 0.0, x, spheres="heads") if g["manifold"]]
    assert [(len(g["params"]), g["row_units"], g["ortho"]) for g in on] == [(2, 4, 0.0)]
    with torch.no_grad():
        model.query.weight.mul_(7)
        model.out.weight.mul_(0.1)
    before = model(x)
    groups = param_groups(model, 0.01, 0.1, 0.0, x, spheres="matrices")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    on = [g for g in groups if g["manifold"]]
    assert [(len(g["params"]), g["row_units"]) for g in on] == [(2, 4), (2, 0)]
    optimizer = cls(groups)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    ones = torch.ones(3)
    for layer in (model.query, model.key):
        torch.testing.assert_close(layer.weight.detach().view(3, 48).norm(dim=1), ones)
    for layer in (model.value, model.out):
        torch.testing.assert_close(layer.weight.detach().norm(), ones[0])
    assert (model(x) - 1).square().mean() < (before - 1).square().mean()
    with pytest.raises(ValueError, match="unknown spheres 'head'; did you mean 'heads'"):
        param_groups(model, 0.1, 0.1, 0.0, x, spheres="head")
