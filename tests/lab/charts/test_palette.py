"""Colours that stay apart for every eye, on either ground."""

import itertools

import numpy as np
import pytest

from flexnorm.lab.charts.palette import HUES, INK, MARKERS, dash, hues, marker_shape

# Vienot, Brettel & Mollon (1999): linear RGB as seen without the red or the green cones.
EYES = {
    "full": np.eye(3),
    "protan": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "deutan": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(colour, eye):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    rgb = np.clip(EYES[eye] @ linear(colour), 0, 1)
    ratio = to_xyz @ rgb / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a, b):
    light, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_stay_apart(eye, scheme):
    names = ["batch", "none", "group", "unitized", "population", "normprop", "layer", "instance"]
    chosen = hues(names, "batch")
    seen = [lab(getattr(hue, scheme), eye) for hue in chosen]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12


@pytest.mark.parametrize(("scheme", "paper"), [("light", "#fdfdfb"), ("dark", "#14171b")])
def test_every_colour_stands_out_from_the_page(scheme, paper):
    assert min(contrast(getattr(hue, scheme), paper) for hue in (INK, *HUES)) > 2.5


def test_a_name_keeps_its_colour():
    full = dict(zip(["batch", "group", "unitized"], hues(["batch", "group", "unitized"], "batch"), strict=True))
    assert hues(["unitized"], "batch")[0] == full["unitized"]
    assert full["batch"] == INK
    assert hues(["batch", "group"], "group") == (hues(["batch"], "x")[0], INK)


def test_strangers_get_colours_of_their_own():
    names = ["batch", "group", *(f"mine{i}" for i in range(7))]
    assert len(set(hues(names, "batch"))) == len(names)
    assert len(hues([f"x{i}" for i in range(40)], "batch")) == 40


def test_optimizers_differ_and_repeat_only_late():
    assert len({(dash(i), marker_shape(i)) for i in range(len(MARKERS))}) == len(MARKERS)
    assert marker_shape(len(MARKERS)) == marker_shape(0)
