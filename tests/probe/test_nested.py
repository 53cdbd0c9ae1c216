"""One walker over what models take and return."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexnorm.probe import arguments, batch_inputs, call, detached, first_tensor, map_tensors, tensors

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    """As Hugging Face's are, but unknown to pytree."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    """Its fields cannot be set."""

    value: Tensor
    number: int = field(default=3, init=False)


class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """A mapping of a class of its own."""


class Items(list):  # type: ignore[type-arg]
    """A list of a class of its own."""


A, B, C = torch.tensor(1.0), torch.tensor([2]), torch.tensor(3.0)


@pytest.mark.parametrize(
    "nested",
    [
        (A, B, C),
        [A, [B, (C,)]],
        {"a": A, "b": (B, None, "text", C)},
        Pair(A, Pair(B, [C])),
        ModelOutput(a=A, b=B, c=(C,)),
        UserDict(a=A, b=[B, C]),
        Output(A, (B, C)),
        (Frozen(A), {"x": Output(B, (), C)}),
        Items([A, (B, UserDict(c=C))]),
        deque([A, B, C]),
        [3, A, nn.Linear(1, 1), B, "x", C],
    ],
)
def test_tensors_of_every_container(nested: Any) -> None:
    assert [id(t) for t in tensors(nested)] == [id(A), id(B), id(C)]
    assert first_tensor(nested) is A
    doubled = map_tensors(lambda t: t * 2, nested)
    assert [float(t) for t in tensors(doubled)] == [2.0, 4.0, 6.0]
    assert [float(t) for t in tensors(nested)] == [1.0, 2.0, 3.0], "the original is left alone"
    assert type(doubled) is (dict if type(nested) in (ModelOutput, UserDict) else type(nested))


def test_what_holds_no_tensor() -> None:
    for nested in (None, 3, "text", (), {}, [None, "x"], Output, nn.Linear(1, 1)):
        assert tensors(nested) == []
        assert first_tensor(nested) is None
        assert map_tensors(lambda t: t + 1, nested) == nested
    assert first_tensor((B, [A])) is A, "the first floating-point one"


def test_fields_that_are_no_tensors_stay() -> None:
    changed = map_tensors(lambda t: t + 1, Frozen(A))
    assert changed == Frozen(A + 1)
    assert changed.number == 3


def test_plain_containers_load_with_weights_only(tmp_path: Any) -> None:
    nested = Pair(UserDict(a=A), ModelOutput(b=[B, Items([C, "x"])]))
    plain = map_tensors(torch.clone, nested, plain=True)
    torch.save(plain, tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True) == ({"a": A}, {"b": [B, [C, "x"]]})
    assert type(plain) is tuple


def test_a_detached_copy_is_independent() -> None:
    weight = torch.ones(2, requires_grad=True)
    (copied,) = detached([weight])
    assert not copied.requires_grad
    assert copied.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize(
    ("example", "args", "kwargs"),
    [
        (A, (A,), {}),
        ((A, B), (A, B), {}),
        ([A], (A,), {}),
        ({"x": A}, (), {"x": A}),
        (UserDict(x=A), (), {"x": A}),
        (None, (None,), {}),
    ],
)
def test_what_a_model_is_called_with(example: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert arguments(example) == (args, kwargs)

    class Takes(nn.Module):
        def forward(self, *got: Any, **named: Any) -> Any:
            return got, named

    assert call(Takes(), example) == (args, kwargs)


def test_inputs_of_a_batch() -> None:
    assert batch_inputs((A, B)) is A
    assert batch_inputs([A]) is A
    assert batch_inputs(A) is A
    assert batch_inputs({"x": A}) == {"x": A}
