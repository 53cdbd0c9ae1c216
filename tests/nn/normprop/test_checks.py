"""What the layers check of their arguments, and what they share with torch's."""

import pytest
from torch import nn

from flexnorm.nn import normprop
from flexnorm.nn.normprop.checks import one_of, positive, sizes


def test_checks_return_what_they_checked_or_say_what_is_wrong():
    assert one_of("mode", "batch", ("global", "batch")) == "batch"
    with pytest.raises(ValueError, match="unknown mode 'bacth'; did you mean 'batch'"):
        one_of("mode", "bacth", ("global", "batch"))
    assert positive("k", 3) == 3
    for bad in (0, -1, 1.0, True, "2"):
        with pytest.raises(ValueError, match="k must be a positive integer"):
            positive("k", bad)
    assert sizes("stride", 2, 3, 1) == (2, 2, 2)
    assert sizes("padding", [0, 1], 2) == (0, 1)
    for bad in ((1, 2, 3), (1, -1), (1.5, 1)):
        with pytest.raises(ValueError, match="padding must be an integer >= 0 or 2 of them"):
            sizes("padding", bad, 2)


@pytest.mark.parametrize(
    "torchs", [nn.Linear, *(getattr(nn, f"Conv{t}{n}d") for t in ("", "Transpose") for n in (1, 2, 3))]
)
def test_layers_are_named_after_torchs_and_take_their_arguments(torchs):
    ours = getattr(normprop, f"NormProp{torchs.__name__}")
    layer = ours(4, 6) if torchs is nn.Linear else ours(4, 6, 3, stride=2, padding=1, groups=2)
    plain = torchs(**{name: getattr(layer, name) for name in ours.shared}, bias=False)
    assert plain.weight.shape == layer.weight.shape
    assert all(getattr(plain, name) == getattr(layer, name) for name in ours.shared)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="unitise"):
        normprop.NormPropLinear(2, 3, unitise=True)
    with pytest.raises(TypeError, match="unitize"):
        normprop.NormPropActivation(2, unitize=True)
