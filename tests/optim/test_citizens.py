"""Both optimizers as citizens of torch.optim: what every training loop and its tools expect of an optimizer."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from sphere_cases import PAIRS, SMALL, drive, gradients, parameters
from torch import nn

from flexnorm.optim import SGDG, AdamG, SphereMonitor

DATA = Path(__file__).parent / "data"
CLASSES = [cls for cls, _ in PAIRS.values()]
both = pytest.mark.parametrize("cls", CLASSES)


def flat_kwargs(cls, **kwargs):
    return {"manifold": False, **({} if cls is AdamG else {"momentum": 0.9}), **kwargs}


# ---- arguments


@both
def test_every_argument_reaches_the_groups(cls):
    given = {
        "lr": 0.3,
        "grad_clip": 0.7,
        "ortho": 0.05,
        "ortho_every": 7,
        "nesterov": True,
        "weight_decay": 0.0,
        "manifold": False,
        "maximize": True,
        "row_dim": 1,
        "row_groups": 2,
        "row_units": 3,
        "foreach": False,
        "compile": True,
        **({"betas": (0.5, 0.6), "eps": 1e-3, "off_manifold": "sgd"} if cls is AdamG else {"momentum": 0.4}),
    }
    group = cls(parameters([(4, 3)]), **given).param_groups[0]
    assert {key: group[key] for key in given} == given
    assert set(group) == {"params", *given}


@both
def test_groups_override_arguments_and_the_callers_dict_is_left_alone(cls):
    a, b = parameters([(4, 3), (4, 3)])
    mine = [{"params": [a], "lr": 0.1, "ortho": 0.0}, {"params": [b], "manifold": False}]
    kept = copy.copy(mine[0]), copy.copy(mine[1])
    optimizer = cls(mine, lr=0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    assert [g["ortho"] for g in optimizer.param_groups] == [0.0, 0.1]
    assert (mine[0], mine[1]) == kept


@both
@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0; got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": torch.ones(2)}, "one element"),
        ({"lr": None}, "no learning rate"),
        ({"lr": "a"}, "lr must be a finite number of at least 0; got 'a'"),
        ({"lr": 1.0, "grad_clip": 0.0}, "grad_clip must be positive"),
        ({"lr": 1.0, "grad_clip": "a"}, "grad_clip must be positive, or None for no clipping; got 'a'"),
        ({"lr": 1.0, "ortho": -0.1}, "ortho must be"),
        ({"lr": 1.0, "ortho_every": 0}, "ortho_every must be a whole number of at least 1; got 0"),
        ({"lr": 1.0, "ortho_every": 2.0}, "ortho_every must be a whole number of at least 1; got 2.0"),
        ({"lr": 1.0, "row_dim": 2}, "row_dim is the axis of the outputs: 0, or 1"),
        ({"lr": 1.0, "row_groups": 3}, "row_groups=3 does not divide"),
        ({"lr": 1.0, "row_units": 3}, "row_units=3 does not divide the 4 output units.*the size of a head, or 0"),
        ({"lr": 1.0, "row_units": -1}, "row_units must be a whole number"),
        ({"lr": 1.0, "weight_decay": 0.1}, "nothing to decay"),
    ],
)
def test_wrong_arguments_are_refused_in_words(cls, kwargs, text):
    with pytest.raises(ValueError, match=text):
        cls(parameters([(4, 3)]), **kwargs)


def test_arguments_of_one_class_only():
    p = parameters([(4, 3)])
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        SGDG(p, lr=1.0, momentum=1.0)
    with pytest.raises(ValueError, match="nesterov"):
        SGDG(p, lr=1.0, momentum=0.0, nesterov=True)
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        AdamG(p, lr=1.0, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps must be"):
        AdamG(p, lr=1.0, eps=-1.0)
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        AdamG(p, lr=1.0, off_manifold="adam")
    with pytest.raises(ValueError, match=r"nesterov=True belongs to SGD.*off_manifold='sgd'"):
        AdamG(p, lr=1.0, nesterov=True, manifold=False)
    optimizer = AdamG(p, lr=1.0)
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        optimizer.add_param_group({"params": parameters([(4, 3)]), "manifold": False, "off_manifold": "adam"})
    assert len(optimizer.param_groups) == 1


@both
def test_parameters_that_cannot_be_on_the_manifold_are_refused(cls):
    with pytest.raises(ValueError, match=r"has no weight vectors.*param_groups"):
        cls(nn.Linear(3, 4).parameters(), lr=0.1)
    with pytest.raises(TypeError, match="complex"):
        cls([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], lr=0.1)
    optimizer = cls(parameters([(4, 3)]), lr=0.1)
    with pytest.raises(ValueError, match="has no weight vectors"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(3, 3))])
    sparse = nn.Parameter(torch.ones(3, 3))
    sparse.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        cls([sparse], lr=0.1).step()


@both
def test_named_parameters_and_printing(cls):
    optimizer = cls(nn.Linear(3, 4, bias=False).named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]
    assert "grad_clip: 0.1" in repr(optimizer)


# ---- what a step does and does not do


@both
def test_nothing_happens_without_gradients(cls, foreach):
    params = parameters(unit=False)
    kept = [p.detach().clone() for p in params]
    optimizer = cls(params, lr=0.1, foreach=foreach)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, kept, strict=True))
    assert not optimizer.state


@both
def test_zero_gradients_leave_points_where_they_are(cls, foreach):
    params = parameters(dtype=torch.float64)
    kept = [p.detach().clone() for p in params]
    optimizer = cls(params, lr=0.1, ortho=0.0, foreach=foreach)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    for p, q in zip(params, kept, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-14, atol=1e-15)


@both
@pytest.mark.parametrize("manifold", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_gradients_are_never_written_to(cls, foreach, manifold, maximize):
    params = parameters([(4, 9), (300, 1000)])
    optimizer = cls(params, lr=0.1, manifold=manifold, maximize=maximize, foreach=foreach)
    grads = gradients(params, 0)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    kept = [g.clone() for g in grads]
    optimizer.step()
    for p, g, k in zip(params, grads, kept, strict=True):
        assert p.grad is g
        assert torch.equal(g, k)


@both
def test_together_equals_one_by_one_with_gaps(cls):
    """Seven steps; in one a gradient is missing, one parameter is empty, one joins late, one row is zero."""
    results = []
    for foreach in (None, False):
        params = [*parameters(dtype=torch.float64), nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.zeros(3, 0))]
        with torch.no_grad():
            params[2][1] = 0
        optimizer = cls(params, lr=0.01, foreach=foreach)
        for step in range(7):
            for i, (p, g) in enumerate(zip(params, gradients(params, step), strict=True)):
                p.grad = None if (i, step) == (1, 3) or (i == 4 and step < 2) else g
            optimizer.step()
        assert (params[2][1] == 0).all()  # a pruned filter stays pruned
        results.append((params, optimizer))
    (a, one), (b, two) = results
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
        for key, value in one.state[p].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, two.state[q][key], rtol=0, atol=1e-13)


@both
def test_rows_are_made_unit_at_the_first_step_whatever_their_size(cls, foreach):
    p = nn.Parameter(torch.tensor([[3e-30, 4e-30], [3e30, 4e30], [3.0, 4.0]]))
    p.grad = torch.zeros_like(p)
    cls([p], lr=0.1, ortho=0.0, foreach=foreach).step()
    torch.testing.assert_close(p.detach(), torch.tensor([[0.6, 0.8]] * 3))


@both
def test_huge_gradients_take_a_clipped_step(cls, foreach):
    p, q = parameters([(2, 5)]), parameters([(2, 5)])
    g = gradients(p, 0, scale=1.0)[0]
    for params, scale in ((p, 1e4), (q, 1e15)):
        params[0].grad = g * scale
        cls(params, lr=0.1, ortho=0.0, foreach=foreach).step()
    torch.testing.assert_close(p[0], q[0], rtol=0, atol=1e-6)


@both
def test_nan_gradients_are_seen_in_the_weights(cls, foreach):
    (p,) = parameters([(2, 5)])
    p.grad = torch.full_like(p, float("nan"))
    cls([p], lr=0.1, foreach=foreach).step()
    assert p.isnan().all()


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(cls, foreach, dtype):
    params, wide = parameters(dtype=dtype), parameters(dtype=dtype)
    wide = [nn.Parameter(p.detach().double()) for p in wide]
    a, b = cls(params, lr=0.05, foreach=foreach), cls(wide, lr=0.05)
    for step in range(5):
        for p, q, g in zip(params, wide, gradients(params, step), strict=True):
            p.grad, q.grad = g, g.double()
        a.step()
        b.step()
    for p, q in zip(params, wide, strict=True):
        assert p.dtype == dtype
        buffer = a.state[p]["exp_avg" if cls is AdamG else "momentum_buffer"]
        assert buffer.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        atol = 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(p.double(), q, rtol=0, atol=atol)


@both
def test_mixed_dtypes_in_one_group_do_not_touch_each_other(cls):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    together = [parameters([(4, 9)], d, seed=i)[0] for i, d in enumerate(dtypes)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    drive(cls(together, lr=0.1, ortho_every=1), together, 3)
    for i, p in enumerate(alone):
        others = gradients(together, 0)  # the same stream of numbers
        optimizer = cls([p], lr=0.1, ortho_every=1)
        for step in range(3):
            p.grad = gradients(together, step)[i]
            optimizer.step()
        assert len(others) == 4
        torch.testing.assert_close(p, together[i], rtol=0, atol=1e-6 if p.dtype != torch.bfloat16 else 1e-2)


@both
def test_memory_formats_and_strides(cls, foreach):
    shape = (6, 4, 3, 3)
    for make in (
        lambda p: p.to(memory_format=torch.channels_last),
        lambda p: p.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        lambda p: torch.stack([p, p], dim=-1)[..., 0],
    ):
        (plain,) = parameters([shape])
        odd = nn.Parameter(make(plain.detach().clone()))
        other = nn.Parameter(make(plain.detach().clone()))
        how = {"lr": 0.1, "ortho_every": 1, "foreach": foreach}
        optimizer, optimizer_odd = cls([plain], **how), cls([odd, other], **how)
        for step in range(4):
            (g,) = gradients([plain], step)
            plain.grad, odd.grad, other.grad = g, make(g), g.clone()
            optimizer.step()
            optimizer_odd.step()
        for p in (odd, other):
            torch.testing.assert_close(p, plain, rtol=0, atol=1e-6)
            assert p.stride() == make(torch.zeros(shape)).stride()


@both
@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_transposed_convolutions(cls, foreach, groups):
    """Grouped transposed weights hold their rows in a roundabout way; written out by hand here."""
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.stack(
        [weight.view(groups, 4 // groups, 3, 2, 2)[g, :, o].flatten() for g in range(groups) for o in range(3)]
    )
    a, b = nn.Parameter(weight), nn.Parameter(rows)
    one = cls([a], lr=0.1, row_dim=1, row_groups=groups, foreach=foreach)
    two = cls([b], lr=0.1, row_groups=groups, foreach=foreach)
    for step in range(4):
        (a.grad,) = gradients([a], step)
        grad = a.grad.view(groups, 4 // groups, 3, 2, 2)
        b.grad = torch.stack([grad[g, :, o].flatten() for g in range(groups) for o in range(3)])
        one.step()
        two.step()
    got = a.detach().view(groups, 4 // groups, 3, 2, 2)
    got = torch.stack([got[g, :, o].flatten() for g in range(groups) for o in range(3)])
    torch.testing.assert_close(got, b.detach(), rtol=0, atol=1e-13)


def by_group(t):
    """Transposed convolution of two groups, (4, 6, 2, 2): its twelve filters, written out."""
    return torch.stack([t.view(2, 2, 6, 2, 2)[g, :, o].flatten() for g in range(2) for o in range(6)])


def last(t):
    return t.to(memory_format=torch.channels_last)


SPHERES = {
    "heads": ((12, 5), {"row_units": 4}, lambda t: t.reshape(3, 20), None),
    "matrix": ((12, 5), {"row_units": 0}, lambda t: t.reshape(1, 60), None),
    "matrix by its height": ((12, 5), {"row_units": 12}, lambda t: t.reshape(1, 60), None),
    "filters": ((6, 4, 3, 3), {"row_units": 2}, lambda t: t.reshape(3, 72), None),
    "filters, channels last": ((6, 4, 3, 3), {"row_units": 2}, lambda t: t.reshape(3, 72), last),
    "all filters, channels last": ((6, 4, 3, 3), {"row_units": 0}, lambda t: t.reshape(1, 216), last),
    "heads of (in, out)": ((5, 12), {"row_dim": 1, "row_units": 4}, lambda t: t.T.reshape(3, 20), None),
    "matrix (in, out)": ((5, 12), {"row_dim": 1, "row_units": 0}, lambda t: t.T.reshape(1, 60), None),
    "transposed": (
        (4, 6, 2, 2),
        {"row_dim": 1, "row_groups": 2, "row_units": 3},
        lambda t: by_group(t).view(4, 24),
        None,
    ),
    "heads in groups": ((12, 5), {"row_groups": 3, "row_units": 2}, lambda t: t.reshape(6, 10), None),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("case", SPHERES)
def test_heads_and_matrices_take_the_steps_of_rows_of_the_papers(name, case, foreach):
    cls, reference = PAIRS[name]
    shape, options, rows, layout = SPHERES[case]
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    p = nn.Parameter(draw() if layout is None else layout(draw()))
    ortho = 0.0 if "groups" in case or case == "transposed" else 0.1
    optimizer = cls([p], lr=0.1, foreach=foreach, ortho=ortho, ortho_every=1, **options)
    slow = reference([rows(p.detach())], 0.1, ortho=ortho)
    for _ in range(5):
        grad = draw() / 10
        p.grad = grad if layout is None else layout(grad)
        optimizer.step()
        slow.step([rows(grad)])
    torch.testing.assert_close(rows(p.detach()), slow.weights[0], rtol=0, atol=1e-12)
    if cls is AdamG:
        assert optimizer.state[p]["exp_avg_sq"].shape == (len(slow.weights[0]),)


@both
def test_heads_resume_to_the_bit_and_are_watched(cls):
    one = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))]
    two = copy.deepcopy(one)

    def make(params):
        return cls([{"params": params[:1], "row_units": 3}, {"params": params[1:], "row_units": 0}], lr=0.1)

    whole, parts = make(one), make(two)
    drive(whole, one, 6)
    drive(parts, two, 3)
    again = make(two)
    again.load_state_dict(pickle.loads(pickle.dumps(parts.state_dict())))
    with SphereMonitor(again) as monitor:
        drive(again, two, 3, start=3)
        stats = monitor.stats()
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert stats["0"].coherence_max > 0
    assert stats["1"].coherence_max == 0  # a sphere of one
    assert one[1].detach().norm() == pytest.approx(1)


def test_groups_of_a_convolution_do_not_repel_each_other():
    # The filters of either group are orthogonal, those of different groups are not.
    start = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.8, 0, 0.6, 0], [0, 0.8, 0, 0.6]])
    for blocks, moves in ((2, False), (1, True)):
        p = nn.Parameter(start.clone())
        p.grad = torch.zeros_like(p)
        SGDG([p], lr=1.0, row_groups=blocks, grad_clip=None).step()
        assert (float((p.detach() - start).abs().max()) > 0.05) == moves


# ---- the neighbours of an optimizer


@both
def test_closure(cls):
    (p,) = parameters([(3, 4)])
    optimizer = cls([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p[:, 0].sum()
        loss.backward()
        return loss

    before = p.detach()[:, 0].sum().item()
    assert optimizer.step(closure).item() == before
    assert p.detach()[:, 0].sum().item() < before


@both
@pytest.mark.parametrize("manifold", [True, False])
def test_tensor_lr_and_schedulers(cls, manifold):
    finals = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        params = parameters()
        optimizer = cls(params, lr=lr, manifold=manifold)
        if isinstance(lr, float) or lr.ndim == 0:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(5):
            drive(optimizer, params, 1, start=step)
            if isinstance(lr, float) or lr.ndim == 0:
                scheduler.step()
            elif step in (1, 3):
                lr.mul_(0.5)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
        finals.append(params)
    for other in finals[1:]:
        for p, q in zip(finals[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.quick(16)
@both
@pytest.mark.parametrize("manifold", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),  # moves momentum or beta1 as well
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
def test_schedulers_of_torch_are_followed(cls, make, manifold, foreach):
    """Step by step as a new optimizer with the state of the old one and the numbers of the scheduler."""
    params, expected = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    optimizer = cls(params, lr=0.1, manifold=manifold, foreach=foreach)
    state, rates = None, []
    scheduler = make(optimizer)
    for step in range(5):
        group = {k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "momentum", "betas")}
        rates.append(group["lr"])
        drive(optimizer, params, 1, start=step)
        fresh = cls(expected, manifold=manifold, foreach=False, **group)
        if state is not None:
            fresh.load_state_dict({"state": state["state"], "param_groups": fresh.state_dict()["param_groups"]})
        drive(fresh, expected, 1, start=step)
        state = fresh.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # some schedulers mind that they see no optimizer.step call
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    assert len({round(rate, 12) for rate in rates}) > 1
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@both
def test_grad_scaler_skips_a_step_with_infinities(cls):
    params = parameters([(4, 9)])
    optimizer, scaler = cls(params, lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    kept = params[0].detach().clone()
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale((params[0] * (float("inf") if bad else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0], kept) == bad
    (expected,) = parameters([(4, 9)])
    expected.grad = torch.ones_like(expected)
    cls([expected], lr=0.1).step()
    torch.testing.assert_close(params[0], expected)


@both
def test_torch_compile_of_the_step(cls):
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        params = parameters([(4, 9), (4, 9)])
        optimizer = cls(params, lr=0.1)
        step = wrap(optimizer.step)
        for i in range(3):
            for p, g in zip(params, gradients(params, i), strict=True):
                p.grad = g
            step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


@both
def test_deepcopy_and_pickle_share_nothing(cls):
    params = parameters()
    optimizer = cls(params, lr=0.1)
    drive(optimizer, params, 2)
    kept = copy.deepcopy(optimizer.state_dict())
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        mine = [p for g in copied.param_groups for p in g["params"]]
        drive(copied, mine, 3, start=2)
        assert_same(optimizer.state_dict(), kept)
    drive(optimizer, params, 3, start=2)
    for p, q in zip(params, mine, strict=True):
        assert torch.equal(p, q)


# ---- state


def assert_same(a, b):
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for key, value in state.items():
            other = b["state"][index][key]
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype
                assert torch.equal(value, other)
            else:
                assert value == other


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("manifold", [True, False])
def test_saved_and_continued_is_uninterrupted_to_the_bit(cls, dtype, manifold, tmp_path):
    straight = parameters(dtype=dtype)
    drive(cls(straight, lr=0.1, manifold=manifold), straight, 20)

    first = parameters(dtype=dtype)
    optimizer = cls(first, lr=0.1, manifold=manifold)
    drive(optimizer, first, 10)
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in first]}, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)

    second = [nn.Parameter(p) for p in loaded["params"]]
    resumed = cls(second, lr=0.7, manifold=manifold)
    resumed.load_state_dict(loaded["optimizer"])
    assert_same(resumed.state_dict(), optimizer.state_dict())
    drive(resumed, second, 10, start=10)
    for p, q in zip(straight, second, strict=True):
        assert torch.equal(p, q)


@both
def test_loading_copies_and_leaves_the_source_alone(cls):
    params, others = parameters(), parameters()
    one, two = cls(params, lr=0.1), cls(others, lr=0.1)
    drive(one, params, 2)
    drive(two, others, 1)  # so that plans for its old state exist
    two.load_state_dict(one.state_dict())
    kept = copy.deepcopy(one.state_dict())
    drive(two, others, 2)
    assert_same(one.state_dict(), kept)


@both
def test_states_from_before_an_option_existed_can_be_loaded(cls):
    params = parameters()
    optimizer = cls(params, lr=0.1)
    drive(optimizer, params, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for key in ("row_dim", "row_groups", "row_units", "compile", "foreach", "maximize", "nesterov"):
            del group[key]
    for state in old["state"].values():
        state.pop("on_sphere", None)
    fresh = cls(params, lr=0.1)
    fresh.load_state_dict(old)
    assert fresh.param_groups[0]["row_groups"] == 1
    drive(fresh, params, 1)


def test_a_state_without_the_choice_off_the_sphere_keeps_sgd():
    params, expected = parameters([(4, 9), (7, 1)]), parameters([(4, 9), (7, 1)])
    groups = [[{"params": p[:1]}, {"params": p[1:], "manifold": False}] for p in (params, expected)]
    old = AdamG(groups[1], lr=0.1, off_manifold="sgd")
    drive(old, expected, 3)
    saved = copy.deepcopy(old.state_dict())
    for group in saved["param_groups"]:
        del group["off_manifold"]
    params[0].data, params[1].data = expected[0].detach().clone(), expected[1].detach().clone()
    new = AdamG(groups[0], lr=0.1)
    assert new.param_groups[1]["betas"] == (0.9, 0.999)
    new.load_state_dict(saved)
    assert [group["off_manifold"] for group in new.param_groups] == ["sgd", "sgd"]
    drive(new, params, 3, start=3)
    drive(old, expected, 3, start=3)
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    assert new.state[params[1]].keys() == {"momentum_buffer"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_off_the_sphere_resumes_to_the_bit(dtype):
    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:], "manifold": False, "weight_decay": 0.1}]

    one = parameters([(4, 9), (3, 5), (7,)], dtype, unit=False)
    straight = AdamG(groups(one), lr=0.1)
    drive(straight, one, 3)
    saved = pickle.loads(pickle.dumps(straight.state_dict()))
    two = [nn.Parameter(p.detach().clone()) for p in one]
    resumed = AdamG(groups(two), lr=9.0, betas=(0.1, 0.1))
    resumed.load_state_dict(saved)
    drive(straight, one, 3, start=3)
    drive(resumed, two, 3, start=3)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert_same(straight.state_dict(), resumed.state_dict())


def test_every_group_gets_the_betas_of_what_moves_it():
    a, b, c, d = parameters([(4, 3)] * 4)
    groups = [
        {"params": [a]},
        {"params": [b], "manifold": False},
        {"params": [c], "manifold": False, "off_manifold": "sgd"},
        {"params": [d], "manifold": False, "betas": (0.5, 0.6)},
    ]
    optimizer = AdamG(groups, lr=0.1)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.99), (0.9, 0.999), (0.9, 0.99), (0.5, 0.6)]
    assert {group["betas"] for group in AdamG([a, b], lr=0.1, betas=(0.8, 0.9)).param_groups} == {(0.8, 0.9)}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=4)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.95] * 4
    assert schedule.get_last_lr()[0] < 0.2


@pytest.mark.parametrize("name", ["SGDG", "AdamG", "AdamG, adamw"])
def test_a_state_saved_by_version_0_1_continues(name, foreach):
    """Saved by the code before the step was written once, after 5 of 10 steps."""
    saved = torch.load(DATA / "state-0.1.pt", weights_only=True)[name]
    params = [nn.Parameter(p) for p in saved["before"]]
    groups = [{"params": params[:2]}, {"params": params[2:], "manifold": False}]
    optimizer = {"SGDG": SGDG, "AdamG": AdamG}[name.split(",")[0]](groups, lr=9.0)
    optimizer.load_state_dict(saved["state"])
    for group in saved["state"]["param_groups"]:
        group |= {"ortho_every": 1, "row_units": 1}  # the only forms there were
    assert_same(optimizer.state_dict(), saved["state"])
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    drive(optimizer, params, 5, start=5)
    for p, after in zip(params, saved["after"], strict=True):
        torch.testing.assert_close(p.detach(), after, rtol=0, atol=1e-13)


@both
def test_memory_replaced_under_the_optimizer_is_noticed(cls):
    params, expected = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    optimizer, plain = cls(params, lr=0.1), cls(expected, lr=0.1, foreach=False)
    for step in range(4):
        drive(optimizer, params, 1, start=step)
        drive(plain, expected, 1, start=step)
        for p in params:
            p.data = p.data.clone()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@both
def test_many_patterns_of_missing_gradients_are_planned_without_end(cls):
    params = parameters([(2, 3)] * 8)
    optimizer = cls(params, lr=0.1)
    for pattern in range(1, 256):
        for i, (p, g) in enumerate(zip(params, gradients(params, pattern), strict=True)):
            p.grad = g if pattern >> i & 1 else None
        optimizer.step()
    assert len(optimizer._workspace._plans) <= 128


# ---- outside the manifold


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: SGDG(p, 0.1, 0.9, manifold=False), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
        (lambda p: SGDG(p, 0.1, 0.0, manifold=False), lambda p: torch.optim.SGD(p, 0.1)),
        (
            lambda p: SGDG(p, 0.1, 0.9, manifold=False, nesterov=True, weight_decay=0.1, maximize=True),
            lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.1, maximize=True),
        ),
        (
            lambda p: AdamG(p, 0.1, manifold=False, off_manifold="sgd", nesterov=True, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=0.1),
        ),
        (
            lambda p: AdamG(p, 0.1, (0.0, 0.9), manifold=False, off_manifold="sgd", nesterov=True),
            lambda p: torch.optim.SGD(p, 0.1),
        ),
        (
            lambda p: AdamG(p, 0.1, manifold=False, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        ),
        (
            lambda p: AdamG(p, torch.tensor(0.1), (0.8, 0.7), 1e-3, manifold=False, maximize=True),
            lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.7), 1e-3, weight_decay=0.0, maximize=True),
        ),
    ],
)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_off_the_manifold_it_is_torchs_own(ours, theirs, foreach):
    shapes = [*SMALL, (7,), (0, 3)]
    a, b = parameters(shapes, unit=False), parameters(shapes, unit=False)
    a[0].data = a[0].data.to(memory_format=torch.channels_last)
    optimizer = ours(a)
    optimizer.param_groups[0]["foreach"] = foreach
    drive(optimizer, a, 10)
    drive(theirs(b), b, 10)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("cls", "off"), [(SGDG, "sgd"), (AdamG, "sgd"), (AdamG, "adamw")])
def test_off_the_manifold_the_fused_kernel_runs_and_agrees_to_the_bit_with_torchs(cls, off):
    shapes = [(4, 9), (7,), (0, 3)]
    a, b = parameters(shapes, unit=False), parameters(shapes, unit=False)
    ours = cls(a, lr=0.1, weight_decay=0.1, **flat_kwargs(cls, **({"off_manifold": off} if cls is AdamG else {})))
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    theirs = {
        "sgd": lambda: sgd(b, 0.1, 0.9, weight_decay=0.1, fused=True),
        "adamw": lambda: adamw(b, 0.1, weight_decay=0.1, fused=True),
    }[off]()
    drive(ours, a, 5)
    drive(theirs, b, 5)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("off", ["sgd", "adamw"])
def test_off_the_manifold_low_precision_keeps_float32_state(off):
    params = parameters([(4, 3), (7,)], torch.bfloat16, unit=False)
    optimizer = AdamG(params, 0.1, manifold=False, off_manifold=off)
    drive(optimizer, params, 3)
    assert all(p.dtype == torch.bfloat16 for p in params)
    for state in optimizer.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())


@both
def test_both_kinds_of_groups_in_one_optimizer(cls):
    a, b = parameters([(4, 9)]), parameters([(4, 9)])
    one = cls([{"params": a}, {"params": b, "manifold": False, "weight_decay": 0.1}], lr=0.1)
    for step in range(3):
        (a[0].grad,), (b[0].grad,) = gradients(a, step), gradients(b, step)
        one.step()
    alone_a, alone_b = parameters([(4, 9)]), parameters([(4, 9)])
    drive(cls(alone_a, lr=0.1), alone_a, 3)
    drive(cls(alone_b, lr=0.1, **flat_kwargs(cls, weight_decay=0.1)), alone_b, 3)
    assert torch.equal(a[0], alone_a[0])
    assert torch.equal(b[0], alone_b[0])
