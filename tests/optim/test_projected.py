"""SGDP and AdamP against their defining equations and against torch where nothing is projected."""

import pytest
import torch
from sphere_cases import SMALL, drive, gradients, parameters
from torch import nn

from flexnorm.optim import SGDP, AdamP
from flexnorm.optim.projected import projected_update


def test_projection_by_hand():
    w = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    tangent = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    update, projected = projected_update(w, tangent, torch.ones(2, 2), 0.1)
    assert projected
    torch.testing.assert_close(update, tangent)


def test_layer_is_tried_when_rows_are_not_orthogonal_to_their_gradients():
    w, g = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])  # orthogonal as a whole only
    update, projected = projected_update(w, g, w + torch.ones(2, 2), 0.1)
    assert projected
    torch.testing.assert_close(float((update * w).sum()), 0.0, rtol=0, atol=1e-6)


def test_other_weights_are_left_alone():
    w, u = torch.eye(2), torch.randn(2, 2)
    update, projected = projected_update(w, torch.ones(2, 2), u, 0.1)
    assert not projected
    assert torch.equal(update, u)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: SGDP(p, 0.1, 0.9, delta=0.0), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
        (lambda p: SGDP(p, 0.1, nesterov=True, delta=0.0), lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
        (lambda p: AdamP(p, 0.1, weight_decay=0.1, delta=0.0), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
    ],
)
def test_without_projection_they_are_torchs(ours, theirs):
    shapes = [*SMALL, (7,), (0, 3)]
    a, b = parameters(shapes, torch.float64, unit=False), parameters(shapes, torch.float64, unit=False)
    drive(ours(a), a, 10)
    drive(theirs(b), b, 10)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [SGDP, AdamP])
def test_projected_weights_decay_by_the_ratio(cls):
    p = nn.Parameter(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    p.grad = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    kwargs = {"momentum": 0.0} if cls is SGDP else {}
    cls([p], 0.5, weight_decay=0.1, wd_ratio=0.2, **kwargs).step()
    assert float(p[0, 0].detach()) == pytest.approx(1 - 0.5 * 0.1 * 0.2)
    assert float(p[0, 1].detach()) == pytest.approx(-0.5, rel=1e-6)


class Published:
    """AdamP and SGDP as published with the paper (two views, first match wins), written out for matrices in float64."""

    def __init__(self, weights, decay):
        self.weights, self.decay, self.step_count = [w.clone() for w in weights], decay, 0
        self.first = [torch.zeros_like(w) for w in weights]
        self.second = [torch.zeros_like(w) for w in weights]

    def projected(self, w, g, u, delta=0.1, wd_ratio=0.1):
        for view in (lambda x: x.reshape(len(x), -1), lambda x: x.reshape(1, -1)):
            a, b = view(w), view(g)
            cosine = (a * b).sum(1).abs() / (a.norm(dim=1) * b.norm(dim=1))
            if cosine.max() < delta / a.shape[1] ** 0.5:
                n = a / a.norm(dim=1, keepdim=True)
                return (view(u) - n * (n * view(u)).sum(1, keepdim=True)).view_as(u), wd_ratio
        return u, 1.0

    def sgdp(self, grads, lr, momentum, nesterov):
        for w, g, m in zip(self.weights, grads, self.first, strict=True):
            m.mul_(momentum).add_(g)
            u, ratio = self.projected(w, g, momentum * m + g if nesterov else m)
            w.mul_(1 - lr * self.decay * ratio / (1 - momentum)).sub_(lr * u)

    def adamp(self, grads, lr, b1=0.9, b2=0.999, eps=1e-8):
        self.step_count += 1
        for w, g, m, v in zip(self.weights, grads, self.first, self.second, strict=True):
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            denominator = v.sqrt() / (1 - b2**self.step_count) ** 0.5 + eps
            u, ratio = self.projected(w, g, m / denominator)
            w.mul_(1 - lr * self.decay * ratio).sub_(lr / (1 - b1**self.step_count) * u)


@pytest.mark.parametrize("name", ["sgdp", "nesterov", "adamp"])
def test_fifty_steps_equal_the_published_algorithm(name):
    params = parameters([(4, 30), (3, 2, 3, 3), (5, 8)], torch.float64, unit=False)
    published = Published([p.detach() for p in params], decay=0.01)
    if name == "adamp":
        optimizer = AdamP(params, 0.01, weight_decay=0.01)
    else:
        optimizer = SGDP(params, 0.05, weight_decay=0.01, nesterov=name == "nesterov")
    cases = set()
    for step in range(50):
        grads = gradients(params, step, scale=1.0)
        for i in range(2):  # the first is tangent row by row, the second as a whole only in every other step
            w, g = params[i].detach().flatten(1), grads[i].flatten(1)
            if i == 0 or step % 2:
                grads[i] = (g - w * ((w * g).sum(1) / w.square().sum(1)).unsqueeze(1)).view_as(grads[i])
            else:
                grads[i] = (g - w * (w * g).sum() / w.square().sum()).view_as(grads[i])
        for p, g, w in zip(params, grads, published.weights, strict=True):
            p.grad = g
            cases.add(published.projected(w, g, g)[1])
        optimizer.step()
        if name == "adamp":
            published.adamp(grads, 0.01)
        else:
            published.sgdp(grads, 0.05, 0.9, name == "nesterov")
    assert cases == {0.1, 1.0}  # both branches were taken
    for p, w in zip(params, published.weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cls", [SGDP, AdamP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_continued_is_uninterrupted_to_the_bit(cls, dtype, tmp_path):
    straight = parameters(dtype=dtype)
    drive(cls(straight, 0.1), straight, 8)
    first = parameters(dtype=dtype)
    optimizer = cls(first, 0.1)
    drive(optimizer, first, 4)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = cls(second, 0.7)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    drive(resumed, second, 4, start=4)
    assert all(torch.equal(p, q) for p, q in zip(straight, second, strict=True))


def test_momentum_does_not_make_weights_grow():
    lengths = []
    for delta in (0.1, 0.0):
        p = nn.Parameter(torch.randn(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        optimizer = SGDP([p], 0.05, delta=delta)
        for step in range(50):
            (g,) = gradients([p], step, scale=1.0)
            w = p.detach()
            p.grad = g - w * (w * g).sum() / w.square().sum()
            optimizer.step()
        lengths.append(float(p.detach().norm()))
    assert lengths[0] < lengths[1]


def test_transposed_and_low_precision():
    p = nn.Parameter(torch.randn(4, 3, 2, 2).bfloat16())
    optimizer = SGDP([p], 0.1, row_dim=1, row_groups=2)
    p.grad = torch.randn_like(p)
    optimizer.step(lambda: p.sum())
    assert p.dtype == torch.bfloat16
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: SGDP(p, -1.0), "lr must be"),
        (lambda p: SGDP(p, 1.0, 1.0), "momentum"),
        (lambda p: SGDP(p, 1.0, delta=-1.0), "delta"),
        (lambda p: AdamP(p, 1.0, (1.0, 0.9)), r"betas\[0\]"),
        (lambda p: AdamP(p, 1.0, weight_decay=-1.0), "weight_decay"),
    ],
)
def test_wrong_arguments(make, text):
    with pytest.raises(ValueError, match=text):
        make(parameters([(2, 3)]))


@pytest.mark.parametrize("cls", [SGDP, AdamP])
def test_every_group_may_have_its_own_learning_rate(cls):
    p, q = parameters([(4, 3), (2, 3)])
    optimizer = cls([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    with pytest.raises(ValueError, match=f"no learning rate: give {cls.__name__} an lr"):
        cls([p])
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0; got 'a'"):
        cls([p], lr="a")
    with pytest.raises(ValueError, match=r"delta must be a finite number of at least 0; got -0\.1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "delta": -0.1, "lr": 0.1})
    assert len(optimizer.param_groups) == 2
