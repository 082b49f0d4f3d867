"""What the endless stream of synthetic clips is drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_MOVING, MAX_STATIC = 8, 6
"""Most objects of each sort in a clip: a rendered clip has as many slots."""

Range = tuple[float, float]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"StreamConfig.{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class StreamConfig:
    """What clips are drawn from. Ranges are (low, high), both included; lists become tuples.

    The defaults contain the scenes of `synthetic.SceneConfig`, whose pictures the demo shows, and go beyond them in
    every respect.

    Attributes:
        num_views: V, frames of a clip.
        sizes: (height, width) in pixels. All clips of a step have one of them; name one twice to see it twice as often.
            Held-out clips have the first.
        fov_degrees: horizontal field of view.
        moving_objects: how many objects move, at most `MAX_MOVING`.
        static_objects: how many more do not, at most `MAX_STATIC`.
        enclosed: share of clips with walls and a ceiling; in the others the floor ends somewhere under a sky.
        room_size: length and width of the room, metres.
        room_height: metres.
        frame_interval: mean seconds between the frames of a clip, the same for all of them; drawn on a logarithmic
            scale. The single intervals differ from it by up to a quarter.
        object_speed: peak speed of moving objects, m/s.
        camera_speed: peak speed of a moving camera, m/s.
        tripod: share of clips whose camera neither moves nor turns.
        panning: share of clips whose camera only turns.
        shake_degrees: how far a hand-held camera turns about its path; half of the moving cameras are hand-held.
        exposure_stops: brightness in powers of two around the neutral one; half of the clips are neutral.
        noise: standard deviation of the sensor's noise, of full scale 1; half of the clips have none.
        blur: side in pixels of the square over which a pixel gathers light; half of the clips have 1.
        shadows: cast shadows.
        supersampling: n for n x n colour samples a pixel; geometry is always that of the pixel's centre.

    Raises:
        ValueError: a value outside what is possible; the message names it.
    """

    num_views: int = 4
    sizes: tuple[tuple[int, int], ...] = ((126, 168), (126, 168), (112, 196), (140, 154), (98, 224), (154, 140))
    fov_degrees: Range = (42.0, 88.0)
    moving_objects: tuple[int, int] = (2, 8)
    static_objects: tuple[int, int] = (0, 6)
    enclosed: float = 0.85
    room_size: Range = (3.5, 10.0)
    room_height: Range = (2.4, 4.0)
    frame_interval: Range = (0.12, 1.0)
    object_speed: Range = (0.25, 2.0)
    camera_speed: Range = (0.2, 1.5)
    tripod: float = 0.08
    panning: float = 0.15
    shake_degrees: Range = (0.2, 2.0)
    exposure_stops: Range = (-0.6, 0.6)
    noise: Range = (0.0, 0.02)
    blur: Range = (1.0, 1.8)
    shadows: bool = True
    supersampling: int = 2

    def __post_init__(self) -> None:
        self._check_sizes()
        for name, least, most in (("num_views", 1, 64), ("supersampling", 1, 8)):
            value = getattr(self, name)
            _require(type(value) is int and least <= value <= most, name, value, f"an int of {least} to {most}")
        for name in ("enclosed", "tripod", "panning"):
            value = getattr(self, name)
            _require(_number(value) and 0 <= value <= 1, name, value, "a share between 0 and 1")
        _require(self.tripod + self.panning <= 1, "panning", self.panning, "at most 1 - tripod")
        _require(type(self.shadows) is bool, "shadows", self.shadows, "True or False")
        self._check("fov_degrees", "degrees between 10 and 150", lambda v: 10 <= v <= 150)
        self._check("moving_objects", f"ints, 0 to {MAX_MOVING}", lambda v: type(v) is int and 0 <= v <= MAX_MOVING)
        self._check("static_objects", f"ints, 0 to {MAX_STATIC}", lambda v: type(v) is int and 0 <= v <= MAX_STATIC)
        self._check("room_size", "metres between 3 and 40", lambda v: 3 <= v <= 40)
        self._check("room_height", "metres between 2.2 and 20", lambda v: 2.2 <= v <= 20)
        self._check("frame_interval", "seconds above 0 and up to 10", lambda v: 0 < v <= 10)
        self._check("object_speed", "m/s above 0 and up to 20", lambda v: 0 < v <= 20)
        self._check("camera_speed", "m/s between 0 and 20", lambda v: 0 <= v <= 20)
        self._check("shake_degrees", "degrees between 0 and 20", lambda v: 0 <= v <= 20)
        self._check("exposure_stops", "stops between -4 and 4", lambda v: -4 <= v <= 4)
        self._check("noise", "between 0 and 0.5 of full scale", lambda v: 0 <= v <= 0.5)
        self._check("blur", "pixels between 0 and 8", lambda v: 0 <= v <= 8)

    def _check_sizes(self) -> None:
        expected = "one (height, width) or more, ints of at least 1 pixel"
        pairs = self.sizes
        _require(isinstance(pairs, (tuple, list)) and len(pairs) > 0, "sizes", pairs, expected)
        for pair in pairs:
            fits = isinstance(pair, (tuple, list)) and len(pair) == 2
            _require(fits and all(type(v) is int and v >= 1 for v in pair), "sizes", pairs, expected)
        object.__setattr__(self, "sizes", tuple((pair[0], pair[1]) for pair in pairs))

    def _check(self, name: str, expected: str, ok: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(_number(v) for v in value)
        _require(pair and value[0] <= value[1], name, value, f"a pair (low, high) with low <= high, {expected}")
        _require(ok(value[0]) and ok(value[1]), name, value, expected)
        object.__setattr__(self, name, (value[0], value[1]))
