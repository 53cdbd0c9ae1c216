"""What the optimizers share, where it decides something: fused kernels, ranges, what saved groups lack."""

import math

import pytest
import torch
from torch import nn

from flexnorm.optim import SGDG, AdamG, adamg, sgdg
from flexnorm.optim.base import check_at_least_zero, check_below_one, fused_takes


def test_what_the_fused_kernels_of_torch_take():
    w = torch.randn(4, 3, 2, 2)
    assert fused_takes([w, nn.Parameter(w)], [w, w], [None, None])
    assert fused_takes([w.double()], [w.double()])
    assert not fused_takes([w], [w.double()])
    assert not fused_takes([w.bfloat16()], [w.bfloat16()])
    assert not fused_takes([w], [w.to(memory_format=torch.channels_last)])
    assert not fused_takes([torch.empty(2, device="meta")])


@pytest.mark.parametrize("value", [-1e-9, math.inf, math.nan])
def test_ranges(value):
    with pytest.raises(ValueError, match=f"eps must be a finite number of at least 0; got {value}"):
        check_at_least_zero({"lr": 0.0, "eps": value}, "lr", "eps")
    with pytest.raises(ValueError, match="momentum must be at least 0 and below 1"):
        check_below_one("momentum", value)


def test_text_is_no_number():
    with pytest.raises(ValueError, match=r"eps must be a finite number of at least 0; got '0.1'"):
        check_at_least_zero({"eps": "0.1"}, "eps")
    with pytest.raises(ValueError, match=r"momentum must be at least 0 and below 1; got '0.1'"):
        check_below_one("momentum", "0.1")


@pytest.mark.parametrize("cls", [SGDG, AdamG])
def test_groups_saved_without_a_key_get_what_classes_did_then_not_what_the_call_says(cls):
    optimizer = cls([nn.Parameter(torch.eye(2))], lr=0.1, ortho=0.0, foreach=False, ortho_every=3)
    saved = optimizer.state_dict()
    for key in ("ortho", "foreach", "maximize", "ortho_every"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["ortho"], group["foreach"], group["maximize"]) == (0.1, None, False)
    assert group["ortho_every"] == 1


def test_functional_forms_are_the_step_of_the_classes(foreach):
    start, grad = torch.eye(3, 4), torch.linspace(-1, 1, 12).view(3, 4)
    common = {"lr": 0.1, "grad_clip": 0.3, "ortho": 0.2, "maximize": True, "foreach": foreach}  # the paper's form
    for cls, keys in ((SGDG, {"momentum": 0.5}), (AdamG, {"betas": (0.5, 0.9), "eps": 1e-3})):
        p, q = nn.Parameter(start.clone()), start.clone()
        optimizer, seen = cls([p], **common, **keys, ortho_every=1), []
        moment, second, step = torch.zeros(3, 4), torch.zeros(3), torch.tensor(0.0)
        for _ in range(3):
            p.grad = grad
            optimizer.step()
            state = ([moment],) if cls is SGDG else ([moment], [second], [step])
            function = sgdg if cls is SGDG else adamg
            function([q], [grad], *state, **common, **keys, observe=lambda i, angle, norm, s=seen: s.append((i, angle)))
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=0)
        assert [i for i, _ in seen] == [0, 0, 0]
        assert all(angle.shape == (3,) for _, angle in seen)
