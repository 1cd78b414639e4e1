"""Colours of a page: contrasts by WCAG 2.2, and how far apart lines are for those who see fewer colours."""

import itertools
import re

import numpy as np
import pytest

from llmchain_fed.federated.reporting import page_style

# Machado, Oliveira, Fernandes 2009, severity 1.0, over linear RGB: protanopia, deuteranopia, tritanopia
SIGHT = {
    sight: np.array(numbers).reshape(3, 3)
    for sight, numbers in {
        "all": np.eye(3),
        "protan": (0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998),
        "deutan": (0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.011820, 0.042940, 0.968881),
        "tritan": (1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.303900),
    }.items()
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour):
    value = np.array([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(float(np.dot([0.2126, 0.7152, 0.0722], linear(c))) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    """CIE 1976 L*a*b*."""
    xyz = XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


MODES = pytest.mark.parametrize(
    ("dark", "lines", "page"),
    [(False, page_style.LIGHT, page_style.PAPER), (True, page_style.DARK, page_style.NIGHT)],
    ids=["light", "dark"],
)


@MODES
def test_lines_stand_out_and_apart_for_everybody(dark, lines, page):
    assert min(contrast(colour, page) for colour in lines) >= 3.0, "WCAG 1.4.11"
    for sight, matrix in SIGHT.items():
        seen = [lab(matrix @ linear(colour)) for colour in lines]
        assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 15, sight


@MODES
def test_every_text_can_be_read(dark, lines, page):
    shades = dict(re.findall(r"--(\w+):(#\w+)", page_style.variables(dark=dark)))
    for name in ("ink", "soft", "better", "worse"):
        for behind in ("paper", "wash"):
            assert contrast(shades[name], shades[behind]) >= 4.5, f"{name} on {behind}: WCAG 1.4.3"


@MODES
def test_nothing_is_green(dark, lines, page):
    """A green would read as a success, which only the words say, by a criterion."""
    for name, colour in re.findall(r"--(\w+):(#\w+)", page_style.variables(dark=dark)):
        red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
        assert not (green > red + 12 and green > blue + 12), (name, colour)
