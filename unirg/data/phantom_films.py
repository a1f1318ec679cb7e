"""Drawn chest films: a grey frontal film from a list of findings, by plain geometry.

Not a simulation of X-rays: a picture whose findings can be seen, are where they are said to be, and vary from patient
to patient. The patient's right is on the left of the film, as radiologists read it. Coordinates run from 0 to 1 across
the film, y downwards; levels from 0 (black, air) to 1 (white, dense).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Grid = np.ndarray  # (size, size) float32
Finding = tuple[str, str | None, str | None, str | None]
"""(name, side "left" | "right" | "bilateral" | None, place | None, severity | None), plain strings that pickle. Places
of lung findings: "apex", "upper", "mid", "lower", "hilum"; of devices: "catheter", "pacemaker"."""

_LEVELS = {"small": 0.0, "mild": 0.0, "moderate": 0.5, "large": 1.0, "severe": 1.0}
_OVERINFLATED = ("hyperinflation", "emphysema", "copd")
_HEIGHTS = {"apex": 0.2, "upper": 0.29, "mid": 0.48, "hilum": 0.48, "lower": 0.66}


@dataclass
class _Film:
    """A film while it is drawn: the levels, the grid of coordinates, and where this patient's organs are."""

    level: Grid
    x: Grid
    y: Grid
    rng: np.random.Generator
    half_width: float  # of the rib cage
    top: float  # height of the apices
    bases: dict[str, float]  # height of each diaphragm's dome
    middle: Grid  # x of the spine at every height (curved in scoliosis)
    lungs: dict[str, Grid]  # 1 inside, 0 outside, soft edge

    def across(self, side: str, part: float) -> float:
        """x of a point `part` of the way from the spine (0) to the ribs (1) on a side."""
        return 0.5 + (-1 if side == "right" else 1) * part * self.half_width


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Grid, Grid]:
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(ticks, (size, size)), np.broadcast_to(ticks[:, None], (size, size))


def _edge(distance: Grid, softness: float) -> Grid:
    """1 where the distance is well above 0, 0 well below, a smooth step of the given width between."""
    return np.clip(distance / (2 * softness) + 0.5, 0, 1)


def _blob(film: _Film, x: float, y: float, rx: float, ry: float, power: float = 1.0) -> Grid:
    """A Gaussian spot; a power above 1 makes its top flat and its edge steep."""
    r2 = ((film.x - x) / rx) ** 2 + ((film.y - y) / ry) ** 2
    return np.exp(-(r2 if power == 1.0 else r2**power))


def _line(film: _Film, start: tuple[float, float], end: tuple[float, float], width: float) -> Grid:
    """A straight stroke with round ends."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((film.x - start[0]) * dx + (film.y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    r2 = (film.x - start[0] - along * dx) ** 2 + (film.y - start[1] - along * dy) ** 2
    return np.exp(-r2 / width**2)


def _sides(side: str | None) -> tuple[str, ...]:
    return (side,) if side in ("left", "right") else ("left", "right")


def _severity(severity: str | None) -> float:
    """0 for small or mild, .5 for moderate, 1 for large or severe; .3 where it is not said."""
    return _LEVELS.get(severity or "", 0.3)


def draw_film(findings: Iterable[Finding], seed: int, size: int = 96) -> np.ndarray:
    """Draw one frontal chest film: uint8 grey levels, shape (size, size), the same for the same arguments.

    Findings of a name that is not drawn (see `DRAWABLE`) leave no trace on the film.
    """
    findings = [finding for finding in findings if finding[0] in DRAWABLE]
    named = {name: (side, place, severity) for name, side, place, severity in findings}
    # one stream each, so that the same patient with another finding differs in nothing else
    patient, findings_rng, exposure = np.random.default_rng(seed).spawn(3)
    film = _anatomy(size, patient, named)
    film.rng = findings_rng
    for name, side, place, severity in findings:
        if name in _STROKES:
            _STROKES[name](film, side, place, severity)
    grain = exposure.standard_normal((size, size), dtype=np.float32)
    grain = 0.6 * grain + 0.4 * np.roll(grain, 1, 0) + 0.4 * np.roll(grain, 1, 1)  # film grain is not quite white
    film.level += 0.022 * grain
    level = np.clip(film.level * exposure.uniform(0.92, 1.08), 0, 1)
    return (level * 255).astype(np.uint8)


def _anatomy(size: int, rng: np.random.Generator, named: dict[str, tuple]) -> _Film:
    """The chest without its focal findings; those that change an organ's shape are drawn here, with the organ."""
    x, y = _grid(size)
    overinflated = not named.keys().isdisjoint(_OVERINFLATED)
    half_width = rng.uniform(0.36, 0.40) + (0.02 if overinflated else 0.0)
    top = rng.uniform(0.09, 0.13)
    base = rng.uniform(0.76, 0.81) + (0.08 if overinflated else 0.0)
    bases = {"right": base - rng.uniform(0.01, 0.03), "left": base + rng.uniform(0.0, 0.02)}
    if "low_lung_volumes" in named:
        bases = {side: height - 0.09 for side, height in bases.items()}
    heart_base = bases["left"]
    if "elevated_diaphragm" in named:
        for side in _sides(named["elevated_diaphragm"][0] or "right"):
            bases[side] -= 0.15
    middle = np.full_like(x[:, :1], 0.5)
    if "scoliosis" in named:
        side, _, severity = named["scoliosis"]
        bend = (0.05 + 0.04 * _severity(severity)) * (1 if side == "left" else -1)
        middle = middle + bend * np.sin((y[:, :1] - 0.1) * np.pi * 1.2)
    film = _Film(np.full((size, size), 0.04, np.float32), x, y, rng, half_width, top, bases, middle, {})

    shoulder = np.minimum(0.46, 0.16 + 1.6 * np.maximum(y - 0.02, 0))
    film.level += 0.58 * _edge(shoulder + 0.02 - np.abs(x - 0.5), 0.02)
    air = 0.46 if overinflated else 0.40
    for side, sign in (("right", -1), ("left", 1)):
        u = (x - 0.5) * sign / half_width  # 0 at the spine, 1 at the ribs
        flat = 0.03 if overinflated else 0.10
        dome = bases[side] + flat * ((u - 0.45) / 0.5) ** 2
        outer = 1.0 - 0.75 * np.clip((0.42 - y) / (0.42 - top), 0, 1) ** 2.2 * (1 - 0.45)
        lung = _edge(outer - u, 0.04) * _edge(u - 0.10, 0.05) * _edge(dome - y, 0.012)
        film.lungs[side] = lung * _edge(y - top - 0.25 * (u - 0.5) ** 2, 0.015)
        film.level -= air * film.lungs[side]
        # vessels: bright near the hilum, fading outwards
        hilum = _blob(film, film.across(side, 0.27), 0.47, 0.055, 0.10)
        film.level += 0.16 * hilum * film.lungs[side]
    _ribs(film)
    _mediastinum(film, named, heart_base)
    return film


def _ribs(film: _Film) -> None:
    offset = film.rng.uniform(0, 1)
    cage = film.lungs["left"] + film.lungs["right"]
    bow = np.abs(film.x - 0.5) / film.half_width
    wave = np.cos(2 * np.pi * ((film.y + 0.22 * (bow - 0.35) ** 2 - 0.10 * bow) * 10.5 + offset))
    film.level += 0.05 * np.maximum(wave, 0) * cage
    for side in ("left", "right"):
        inner, outer = film.across(side, 0.12), film.across(side, 1.0)
        film.level += 0.13 * _line(film, (inner, film.top + 0.07), (outer, film.top + 0.02), 0.018)


def _mediastinum(film: _Film, named: dict[str, tuple], heart_base: float) -> None:
    """Spine, great vessels, heart and trachea, with the findings that are their shape."""
    rng, x, y = film.rng, film.x, film.y
    soft = np.zeros_like(film.level)
    width = 0.052 + rng.uniform(-0.004, 0.004)
    soft = np.maximum(soft, 0.85 * _edge(width - np.abs(x - film.middle), 0.012))
    upper = 0.075 + (0.055 if "enlarged_mediastinum" in named else 0.0)
    soft = np.maximum(soft, 0.9 * _edge(upper - np.abs(x - 0.505), 0.015) * _edge(0.50 - np.abs(y - 0.2), 0.2))
    knob = 0.045
    if "aortic_tortuosity" in named:
        knob = 0.07
        soft = np.maximum(soft, 0.9 * _edge(0.028 - np.abs(x - 0.595 - 0.02 * np.sin(9 * y)), 0.015) * (y > 0.34))
    soft = np.maximum(soft, 0.9 * _blob(film, 0.565, 0.36, knob, knob, 2.0))
    # the heart's half width makes the cardiothoracic ratio: about .45 of the cage, above .55 when enlarged
    ratio = rng.uniform(0.40, 0.45)
    if "cardiomegaly" in named:
        ratio = 0.39 + 0.4 * ratio + 0.13 * _severity(named["cardiomegaly"][2])
    elif not named.keys().isdisjoint(_OVERINFLATED):
        ratio -= 0.06
    rx = ratio * film.half_width
    soft = np.maximum(soft, 0.95 * _blob(film, 0.5 + 0.33 * rx, heart_base - 0.125, rx * 0.98, 0.185, 2.6))
    level = film.level
    np.copyto(level, np.maximum(level, 0.70 * soft))
    if "aortic_calcification" in named:
        level += 0.35 * np.exp(-(((np.hypot(x - 0.565, y - 0.36) - knob) / 0.008) ** 2)) * (x > 0.565)
    level -= 0.16 * _edge(0.018 - np.abs(x - 0.5), 0.008) * _edge(0.34 - y, 0.03)  # trachea
    discs = np.maximum(np.cos(2 * np.pi * y * 15), 0)
    level += 0.05 * discs * _edge(0.03 - np.abs(x - film.middle), 0.01)


def _effusion(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for one in _sides(side):
        u = (film.x - 0.5) * (-1 if one == "right" else 1) / film.half_width
        depth = 0.09 + 0.30 * _severity(severity) + film.rng.uniform(-0.01, 0.02)
        surface = film.bases[one] + 0.05 - depth - 0.13 * np.clip(u, 0, 1) ** 3 + 0.05 * (1 - np.clip(u, 0, 1))
        inside = _edge(film.y - surface, 0.02) * _edge(u - 0.02, 0.05) * _edge(0.99 - u, 0.04)
        film.level += (0.74 - film.level) * inside * _edge(0.98 - film.y, 0.02) * (film.level < 0.74)


def _blunting(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for one in _sides(side):
        corner = _blob(film, film.across(one, 0.97), film.bases[one] + 0.05, 0.07, 0.07, 2.0)
        film.level += (0.66 - film.level) * corner * (film.level < 0.66)


def _pneumothorax(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for one in _sides(side):
        u = (film.x - 0.5) * (-1 if one == "right" else 1) / film.half_width
        reach = 0.13 + 0.22 * _severity(severity) + film.rng.uniform(0, 0.03)
        # the retracted lung is a half ellipse on the spine; the air lies beyond its edge, widest at the apex
        height = film.bases[one] + 0.02 - film.top
        low = np.clip((film.bases[one] + 0.02 - film.y) / height, 0, 1)  # 0 at the base, 1 at the apex
        inner = (1.0 - 0.5 * reach) * np.sqrt(np.maximum(1 - (low / (1.0 - 0.6 * reach)) ** 2.6, 0))
        gap = u - inner
        air = _edge(gap, 0.015) * film.lungs[one]
        film.level += (0.05 - film.level) * 0.85 * air
        film.level += 0.34 * np.exp(-((gap / 0.03) ** 2)) * film.lungs[one] * (low > 0.2)


def _patch(film: _Film, side: str | None, place: str | None, radius: float, strength: float, power: float) -> None:
    for one in _sides(side):
        at = film.rng.uniform(0.52, 0.68), _HEIGHTS.get(place or "", 0.6) + film.rng.uniform(-0.02, 0.02)
        rx, ry = radius * film.rng.uniform(0.9, 1.15), radius * film.rng.uniform(0.85, 1.1)
        spot = _blob(film, film.across(one, at[0]), at[1], rx, ry, power) * film.lungs[one]
        film.level += (0.66 - film.level) * strength * spot * (film.level < 0.66)


def _opacity(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    _patch(film, side, place, 0.085 + 0.03 * _severity(severity), 0.72, 1.0)


def _consolidation(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    _patch(film, side, place, 0.115 + 0.03 * _severity(severity), 0.97, 2.0)


def _atelectasis(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for one in _sides(side):
        height = {"upper": 0.3, "mid": 0.5}.get(place or "", film.bases[one] - 0.075)
        for step in range(2 + round(2 * _severity(severity))):
            at = height - 0.042 * step
            tilt = film.rng.uniform(-0.02, 0.02)
            ends = (film.across(one, 0.36), at + tilt), (film.across(one, 0.86), at - tilt)
            film.level += 0.38 * _line(film, *ends, 0.012) * film.lungs[one]


def _edema(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    amount = 0.7 + 0.6 * _severity(severity)
    # interstitial strands: waves of random direction, crossing
    strands = np.zeros_like(film.level)
    for turn in film.rng.uniform(0, np.pi, 5):
        wave = 2 * np.pi * 11 * (np.cos(turn) * film.x + np.sin(turn) * film.y)
        strands += np.sin(wave + film.rng.uniform(0, 6))
    for one in ("left", "right"):
        haze = _blob(film, film.across(one, 0.35), 0.53, 0.16, 0.24)
        film.level += amount * (0.20 * haze + 0.035 * strands * (0.3 + haze)) * film.lungs[one]


def _spot(film: _Film, side: str | None, place: str | None, radius: float, level: float) -> None:
    for one in _sides(side):
        at = film.rng.uniform(0.5, 0.72), _HEIGHTS.get(place or "", 0.5) + film.rng.uniform(-0.03, 0.03)
        film.level += (level - film.level) * _blob(film, film.across(one, at[0]), at[1], radius, radius, 3.0)


def _nodule(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    _spot(film, side, place, 0.036, 0.86)


def _mass(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    _spot(film, side, place, 0.075 + 0.02 * _severity(severity), 0.82)


def _lymphadenopathy(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for one in _sides(side):
        for height in (0.43, 0.5):
            film.level += 0.22 * _blob(film, film.across(one, 0.3), height, 0.045, 0.04, 2.0) * film.lungs[one]


def _granuloma(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for _ in range(2):
        one = side if side in ("left", "right") else film.rng.choice(["left", "right"])
        _spot(film, one, place or str(film.rng.choice(["upper", "mid", "lower"])), 0.018, 1.0)


def _device(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    if place == "pacemaker":
        one = side if side in ("left", "right") else "left"
        x, y = film.across(one, 0.72), 0.24
        box = _edge(0.055 - np.abs(film.x - x), 0.006) * _edge(0.045 - np.abs(film.y - y), 0.006)
        wires = _line(film, (x, y), (0.53, 0.33), 0.010) + _line(film, (0.53, 0.33), (0.56, 0.68), 0.010)
    else:
        one = side if side in ("left", "right") else "right"
        bend = (film.across(one, 0.16), 0.24)
        box = _line(film, (film.across(one, 0.95), 0.12), bend, 0.010)
        wires = _line(film, bend, (0.475, 0.5), 0.010)
    film.level += 0.45 * np.minimum(box + wires, 1)


def _scarring(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for one in _sides(side):
        height = _HEIGHTS.get(place or "", _HEIGHTS["upper"])
        for _ in range(3):
            x, turn = film.across(one, film.rng.uniform(0.35, 0.65)), film.rng.uniform(-0.05, 0.05)
            film.level += 0.25 * _line(film, (x, height - 0.06), (x + turn, height + 0.05), 0.009) * film.lungs[one]


def _thickening(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for one in _sides(side):
        rim = film.lungs[one] * _edge(film.top + 0.045 - film.y, 0.02)
        film.level += 0.4 * rim


def _degenerative(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    for height in (0.42, 0.53, 0.64, 0.75):
        for edge in (-0.055, 0.055):
            film.level += 0.28 * _blob(film, 0.5 + edge, height + film.rng.uniform(-0.02, 0.02), 0.022, 0.012)


def _fracture(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    one = side if side in ("left", "right") else "right"
    for height in (0.38, 0.47):
        film.level += 0.35 * _blob(film, film.across(one, 0.93), height, 0.03, 0.016)
        film.level -= 0.35 * _line(film, (film.across(one, 0.9), height), (film.across(one, 0.96), height), 0.006)


def _hernia(film: _Film, side: str | None, place: str | None, severity: str | None) -> None:
    r = np.hypot(film.x - 0.51, film.y - 0.72)
    film.level -= 0.30 * _edge(0.06 - r, 0.01)
    film.level += 0.25 * np.exp(-(((r - 0.065) / 0.012) ** 2))


_STROKES: dict[str, Callable[[_Film, str | None, str | None, str | None], None]] = {
    "effusion": _effusion,
    "blunted_angle": _blunting,
    "pneumothorax": _pneumothorax,
    "opacity": _opacity,
    "infiltrate": _opacity,
    "pneumonia": _consolidation,
    "consolidation": _consolidation,
    "atelectasis": _atelectasis,
    "edema": _edema,
    "congestion": _edema,
    "heart_failure": _edema,
    "interstitial_disease": _edema,
    "nodule": _nodule,
    "nodular_opacity": _nodule,
    "mass": _mass,
    "lymphadenopathy": _lymphadenopathy,
    "granuloma": _granuloma,
    "device": _device,
    "scarring": _scarring,
    "fibrosis": _scarring,
    "pleural_thickening": _thickening,
    "degenerative_change": _degenerative,
    "fracture": _fracture,
    "hernia": _hernia,
}
_SHAPES = (
    *("cardiomegaly", "enlarged_mediastinum", "aortic_tortuosity", "aortic_calcification", "scoliosis"),
    *_OVERINFLATED,
    *("low_lung_volumes", "elevated_diaphragm"),
)
DRAWABLE: tuple[str, ...] = (*_STROKES, *_SHAPES)
"""The findings that leave a trace on a drawn film."""
