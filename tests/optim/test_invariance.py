"""Which weights are scale invariant: networks where the answer is known, and that nothing is changed by asking."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from sphere_networks import IMAGES, zoo
from torch import nn

from flexnorm.optim import SGDG, param_groups, scale_invariant_weights
from flexnorm.optim.invariance import _candidates, _unfit, probing

INVARIANT = ["stem.weight", "block.conv1.weight", "up.weight", "depthwise.weight", "grouped.weight", "linear.weight"]


def test_a_network_of_everything():
    report = scale_invariant_weights(zoo(), IMAGES)
    assert report.selected == INVARIANT
    assert len(report) == len(list(zoo().parameters()))
    for name in ("before_group.weight", "before_layer.weight"):
        assert not report[name].selected
        assert report[name].change > 0.01
    assert "rescaling rows changes the output" in report["block.conv2.weight"].reason
    assert "rescaling rows changes the output" in report["head.weight"].reason
    assert "vector" in report["stem.bias"].reason
    assert all(report[name].change < 1e-5 for name in INVARIANT)
    up = report["up.weight"]
    assert (up.rows, up.n, up.row_dim, up.row_groups) == (12, 4 * 9, 1, 2)
    assert (report["depthwise.weight"].row_groups, report["depthwise.weight"].n) == (12, 9)
    assert "manifold  stem.weight" in str(report)


def test_a_norm_that_mixes_rows_is_named():
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.GroupNorm(2, 8))
    with torch.no_grad():
        model[0].bias.zero_()
    report = scale_invariant_weights(nn.Sequential(nn.Linear(5, 8, bias=False), nn.LayerNorm(8)), torch.zeros(4, 5))
    assert "all rows are scaled alike" in report["0.weight"].reason
    assert not scale_invariant_weights(model, torch.zeros(4, 5)).selected


@pytest.mark.parametrize(("ndim", "conv", "norm"), [
    (1, nn.Conv1d, nn.BatchNorm1d), (2, nn.Conv2d, nn.BatchNorm2d), (3, nn.Conv3d, nn.BatchNorm3d),
    (1, nn.ConvTranspose1d, nn.BatchNorm1d), (2, nn.ConvTranspose2d, nn.BatchNorm2d),
    (3, nn.ConvTranspose3d, nn.BatchNorm3d),
])  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_every_kind(ndim, conv, norm, groups):
    model = nn.Sequential(conv(4, 6, 2, groups=groups), norm(6), nn.ReLU(), conv(6, 4, 2, groups=groups))
    report = scale_invariant_weights(model, torch.zeros(4, 4, *[4] * ndim))
    assert report.selected == ["0.weight"]
    assert report["0.weight"].rows == 6
    groups = param_groups(model, 0.1, 0.1, 0.0, torch.zeros(4, 4, *[4] * ndim))
    optimizer = SGDG(groups)
    model(torch.randn(4, 4, *[4] * ndim)).square().mean().backward()
    optimizer.step()


def test_a_branch_that_is_silent_at_first_is_still_judged():
    """With the last gain at zero, as residual networks like it, no weight of the branch has any influence."""

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x):
            return x + self.norm(self.last(self.conv(x).relu()))

    assert scale_invariant_weights(Silent(), torch.zeros(4, 4, 6, 6)).selected == ["last.weight"]


def test_saturation_does_not_pass_for_invariance():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3), nn.Softmax(1))
    assert scale_invariant_weights(model, torch.zeros(4, 5)).selected == []


def test_tiny_batches_do_not_pass_for_invariance():
    """Normalized over two values, anything is +-1."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    for batch in (1, 2):
        assert scale_invariant_weights(model, torch.zeros(batch, 5)).selected == ["2.weight"]


def test_unused_weights_are_told_apart():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    model.register_module("spare", nn.Linear(3, 4))
    model.forward = lambda x: model[1](model[0](x))
    report = scale_invariant_weights(model, torch.zeros(4, 3))
    assert "no influence" in report["spare.weight"].reason
    assert report["0.weight"].selected


def test_weights_that_are_normalized_by_their_own_layer():
    class Unit(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight / (self.weight.norm(dim=1, keepdim=True) + 0.0), self.bias)

    model = nn.Sequential(Unit(5, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))
    report = scale_invariant_weights(model, torch.zeros(4, 5))
    assert report.selected == ["0.weight", "2.parametrizations.weight.original1"]
    assert "length one" in report["2.parametrizations.weight.original0"].reason


def test_eps_inside_a_function_is_tolerated():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x):
            y = F.batch_norm(self.conv(x), None, None, training=True, eps=1e-5)
            return self.head(y.relu().mean((2, 3)))

    report = scale_invariant_weights(Functional(), torch.zeros(4, 3, 6, 6))
    assert report.selected == ["conv.weight"]
    assert 0 < report["conv.weight"].change < 1e-3


def test_tied_weights():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    report = scale_invariant_weights(model, torch.zeros(4, 6))
    assert report.selected == ["0.weight"]
    assert report["0.weight"].modules == ("0", "2")
    model[4].weight = model[0].weight  # now one user is not normalized
    assert scale_invariant_weights(model, torch.zeros(4, 6)).selected == []


def test_models_with_several_inputs_outputs_and_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.norm = nn.Embedding(10, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, ids, mask=None, scale=1.0):
            x = self.norm(self.mix(self.embed(ids).mean(1)))
            return {"logits": [x * scale, ids], "mask": mask}

    ids = torch.randint(0, 10, (16, 5))
    for example in ((ids,), {"ids": ids, "scale": 2.0}, [ids, ids > 3]):
        assert scale_invariant_weights(Tokens(), example).selected == ["mix.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).to(dtype)
    assert scale_invariant_weights(model, torch.zeros(4, 5, dtype=dtype)).selected == ["0.weight"]
    assert all(p.dtype == dtype for p in model.parameters())


def test_nothing_is_left_changed():
    model = zoo()
    model.eval()
    model.block.train()
    kept, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    addresses = [p.data_ptr() for p in model.parameters()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    scale_invariant_weights(model, IMAGES)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert model.stem_norm.eps == 1e-5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_fails_is_restored_too():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            raise KeyError("broken")

    model = Broken().eval()
    with pytest.raises(KeyError, match="broken"):
        scale_invariant_weights(model, torch.zeros(2, 3))
    assert not model.training
    assert model.norm.eps == 1e-5


def test_paper_rule():
    """Convolutions with more inputs than outputs: what a WRN and a VGG put on the manifold."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(3, 64, 3), nn.Conv2d(16, 32, 1), nn.Linear(512, 10))
    report = scale_invariant_weights(model, select="paper")
    assert report.selected == ["0.weight"]
    assert report.select == "paper"
    assert "27 inputs, 64 outputs" in report["1.weight"].reason
    assert report["3.weight"].reason == "not a convolution"


def test_errors():
    linear = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="did you mean 'probe'"):
        scale_invariant_weights(linear, torch.zeros(2, 3), select="prob")
    with pytest.raises(ValueError, match="needs example_input"):
        scale_invariant_weights(linear)
    with pytest.raises(ValueError, match="no parameters"):
        scale_invariant_weights(nn.ReLU(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="lazy"):
        scale_invariant_weights(nn.Sequential(nn.LazyLinear(3)), torch.zeros(2, 3))

    class Log(nn.Linear):
        def forward(self, x):
            return super().forward(x).log()

    with pytest.raises(ValueError, match="not finite"):
        scale_invariant_weights(Log(3, 3), torch.zeros(2, 3))

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) + self.calls

    with pytest.raises(ValueError, match="two outputs"):
        scale_invariant_weights(Counting(3, 3), torch.zeros(2, 3))


def test_weights_that_cannot_be_random_are_probed_as_they_are():
    class Positive(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.rand(4, 3) + 0.5), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x @ self.weight.log().exp().T)

    report = scale_invariant_weights(Positive(), torch.zeros(4, 3))
    assert report.selected == ["weight"]
    assert report["weight"].change < 1e-5


def test_empty_and_integer_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_parameter("none", nn.Parameter(torch.zeros(0, 3)))
    model.register_parameter("table", nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False))
    report = scale_invariant_weights(model, torch.zeros(4, 3))
    assert report["none"].reason == "empty"
    assert "int64" in report["table"].reason


def test_candidates_know_where_their_rows_are():
    model = zoo()
    reports = {r.name: r for r in _candidates(model)}
    assert list(reports) == [name for name, _ in model.named_parameters()]
    up = reports["up.weight"]
    assert (up.rows, up.n, up.row_dim, up.row_groups, up.modules) == (12, 36, 1, 2, ("up",))
    assert (reports["linear.weight"].row_dim, reports["linear.weight"].row_groups) == (0, 1)
    assert {bool(r.reason) for name, r in reports.items() if r.parameter.ndim < 2} == {True}
    assert not any(_unfit(r) for r in reports.values() if r.parameter.ndim >= 2)
    assert not any(r.selected for r in reports.values())


def test_a_probe_runs_on_noise_in_batches_of_sixteen_and_drops_what_it_changed():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with probing(model, torch.zeros(2, 3)) as probe:
        assert probe.args[0].shape == (16, 3)
        assert float(probe.args[0].std()) > 0.5
        assert (model.training, model[1].eps) == (True, 1e-30)
        assert torch.equal(probe.run({}), probe.run({}))
        assert probe.distance("0.weight", probe.another(probe.parameters["0.weight"])) > 0.1
        assert probe.distance("0.weight", 2 * probe.parameters["0.weight"]) < 1e-6
        assert probe.distance("0.weight", probe.parameters["0.weight"] * float("nan")) == float("inf")
    assert (model.training, model[1].eps, int(model[1].num_batches_tracked)) == (False, 1e-5, 0)


class Attention(nn.Module):
    """Query and key normalized head by head, as in Qwen3, or together, as in OLMo2."""

    def __init__(self, together=False, layer=nn.Linear):
        super().__init__()
        self.query, self.key, self.value = (layer(12, 12) for _ in range(3))
        self.out, self.mlp, self.together = nn.Linear(12, 12), nn.Linear(12, 12), together

    def heads(self, x):
        shape, own = (*x.shape[:-1], 3, 4), (12,) if self.together else (4,)
        return (F.rms_norm(x, own) if self.together else F.rms_norm(x.view(shape), own)).view(shape).transpose(-2, -3)

    def forward(self, x):
        q, k = self.heads(self.query(x)), self.heads(self.key(x))
        v = self.value(x).view(*x.shape[:-1], 3, 4).transpose(-2, -3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return x + F.rms_norm(self.mlp(x), (12,))  # sandwiched


class InOut(nn.Linear):
    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(("together", "units"), [(False, 4), (True, 12)])
@pytest.mark.parametrize("layer", [lambda a, b: nn.Linear(a, b, bias=False), InOut])
def test_heads_and_matrices_are_found(together, units, layer):
    torch.manual_seed(0)
    model = Attention(together, layer)
    nn.init.zeros_(model.mlp.bias)
    report = scale_invariant_weights(model, torch.zeros(4, 6, 12))
    assert report.selected == []
    found = {name: r.together for name, r in report.items() if r.parameter.ndim == 2}
    # The bias of the sandwiched map is random while it is probed, so that its weight alone has a length.
    assert found == {"query.weight": units, "key.weight": units, "value.weight": 0, "out.weight": 0, "mlp.weight": 0}
    words = "in blocks of 4 rows: heads" if units == 4 else "when all rows are scaled alike"
    assert words in report["query.weight"].reason
    assert report["query.weight"].change < 1e-5
    assert report["value.weight"].change > 0.01


def test_stopped_gradients_do_not_pass_for_invariance():
    """Backward as batch normalization, forward with fixed statistics: by Euler's identity alone, it would pass."""

    class Stopped(nn.BatchNorm1d):
        def forward(self, x):
            y = super().forward(x)
            return y + (x / 3 - y).detach()

    model = nn.Sequential(nn.Linear(5, 8), Stopped(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    assert scale_invariant_weights(model, torch.zeros(4, 5)).selected == ["2.weight"]


def test_models_without_gradient_are_tried_forwards():
    class NoGradient(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.LayerNorm(8))

        @torch.no_grad()
        def forward(self, x):
            return self.net(x)

    report = scale_invariant_weights(NoGradient(), torch.zeros(4, 5))
    assert report.selected == ["net.0.weight"]
    assert report["net.2.weight"].together == 0


def test_networks_that_recompute_their_activations():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh()), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False))

    assert scale_invariant_weights(Recomputed(), torch.zeros(4, 5)).selected == ["net.0.weight"]


def test_a_network_of_many_weights_takes_few_forwards():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(40)))
    model.append(nn.Linear(8, 2))
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    model[0].register_forward_pre_hook(count)
    assert len(scale_invariant_weights(model, torch.zeros(4, 8)).selected) == 40
    assert calls <= 6
