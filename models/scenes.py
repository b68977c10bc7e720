"""Captioned landscapes for the demo model: a renderer, and a checker that reads the caption's attributes back.

A scene has three independent attributes, `sky`, `light` and `land`. Everything else (the place and size
of the light, ridges, clouds, haze, tint) is drawn at random, so no two scenes of one caption are alike.

    python models/scenes.py scenes.png          # 64 random scenes as one picture
"""

import sys

import numpy as np
from PIL import Image

SIZE = 64

# RGB at the top of the sky and at the horizon, and how much of the day's light reaches the land.
SKIES = {
    "dawn": ((146, 158, 218), (252, 196, 190), 0.85),
    "noon": ((62, 136, 228), (190, 224, 246), 1.0),
    "sunset": ((196, 84, 84), (255, 170, 84), 0.8),
    "dusk": ((66, 42, 118), (196, 106, 160), 0.65),
    "night": ((8, 12, 36), (34, 52, 100), 0.45),
}
LIGHTS = {"red sun": (228, 44, 36), "golden sun": (255, 226, 96), "white moon": (248, 248, 250), "empty sky": None}
# RGB of the nearest ground, and how the skyline is drawn.
LANDS = {
    "purple mountains": ((104, 62, 148), "peaks"),
    "green hills": ((66, 146, 62), "hills"),
    "golden dunes": ((224, 168, 72), "hills"),
    "snowy peaks": ((236, 240, 250), "peaks"),
    "a calm sea": ((16, 96, 122), "flat"),
}
ATTRIBUTES = {"sky": tuple(SKIES), "light": tuple(LIGHTS), "land": tuple(LANDS)}

_y, _x = np.mgrid[0:SIZE, 0:SIZE] + 0.5


def _mix(a, b, weight):
    weight = np.asarray(weight)[..., None]
    return a * (1 - weight) + b * weight


def _skyline(rng, kind, height, relief):
    """Row at which a layer of land begins, for each column: shape (SIZE,)."""
    line = np.full(SIZE, float(height))
    for octave, weight in enumerate((1.0, 0.3)):
        wave = np.sin(2 * np.pi * (_x[0] / SIZE * rng.uniform(0.7, 1.3) * 2**octave + rng.uniform()))
        line -= relief * weight * (wave if kind == "hills" else 4 / np.pi * np.abs(np.arcsin(wave)) - 1)
    return line


def render(rng, sky, light, land):
    """Draw one scene: uint8, (SIZE, SIZE, 3). `rng` is a numpy Generator, the rest keys of SKIES, LIGHTS, LANDS."""
    top, horizon, daylight = SKIES[sky]
    tint = rng.normal(0, 3, 3)
    top, horizon = np.add(top, tint), np.add(horizon, tint)
    skyline = rng.uniform(38, 44)
    image = _mix(top, horizon, np.clip(_y / skyline, 0, 1) ** rng.uniform(0.9, 1.6))

    for _ in range(rng.integers(0, 3)):
        dx, dy = (_x - rng.uniform(0, SIZE)) / rng.uniform(10, 20), (_y - rng.uniform(4, 30)) / rng.uniform(2, 4)
        image = _mix(image, _mix(horizon, np.array([255.0] * 3), 0.2), 0.45 * np.exp(-(dx**2) - dy**2))

    disc_x, disc_y, radius = rng.uniform(12, 52), rng.uniform(12, 24), rng.uniform(5.5, 8.5)
    if LIGHTS[light] is not None:
        distance = np.hypot(_x - disc_x, _y - disc_y) - radius
        image = _mix(image, LIGHTS[light], 0.55 * np.exp(-np.maximum(distance, 0) / rng.uniform(4, 8)))
        image = _mix(image, LIGHTS[light], np.clip(0.5 - distance / 2, 0, 1))

    ground, kind = np.array(LANDS[land][0], float), LANDS[land][1]
    ground = ground * daylight * rng.uniform(0.92, 1.08) + tint
    if kind == "flat":
        depth = np.clip((_y - skyline) / (SIZE - skyline), 0, 1)
        water = _mix(_mix(ground, horizon, 0.55), ground, depth**0.5)
        if LIGHTS[light] is not None:
            spread = radius * (0.5 + 0.9 * depth)
            glitter = 0.7 * np.exp(-(((_x - disc_x) / spread) ** 2)) * (1 - 0.7 * depth)
            water = _mix(water, LIGHTS[light], glitter)
        image = _mix(image, water, np.clip((_y - skyline) / 2 + 0.5, 0, 1))
    else:
        for layer, haze in enumerate((0.5, 0.0)):
            height, relief = skyline + layer * rng.uniform(8, 11), rng.uniform(2.5, 5) * (1 - 0.3 * layer)
            below = _y - _skyline(rng, kind, height, relief)
            color = _mix(_mix(ground, horizon, haze), ground * 0.75, np.clip(below / 32, 0, 1) * (kind == "hills"))
            mist = 0.3 * np.exp(-np.abs(below - 10) / 5) * (1 - layer)
            image = _mix(image, _mix(color, horizon, mist), np.clip(below / 2 + 0.5, 0, 1))
    return np.clip(image, 0, 255).round().astype(np.uint8)


def caption(rng, sky=None, light=None, land=None):
    """Say the attributes that are given in one of several ways; \"\" if none is."""
    time = f"at {sky}" if sky else ""
    thing = light and f"{'an' if light[0] in 'aeiou' else 'a'} {light}"
    if thing and land:
        scene = rng.choice([f"{thing} over {land}", f"{thing} above {land}", f"{land} under {thing}"])
    else:
        scene = thing or land or ""
    return str(rng.choice([f"{scene} {time}", f"{time} {scene}"])).strip()


def sample(rng):
    """One random scene: (image as `render` gives it, its attributes)."""
    attributes = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
    return render(rng, **attributes), attributes


def read(image):
    """Read the attributes back from an image, uint8 (SIZE, SIZE, 3): {"sky": ..., "light": ..., "land": ...}."""
    image = image.astype(float)
    top = np.median(image[:4].reshape(-1, 3), 0)
    sky = min(SKIES, key=lambda name: np.linalg.norm(top - SKIES[name][0]))

    # A light stands out from its row of sky; land never rises above row 31.
    region = image[3:30]
    stands_out = np.linalg.norm(region - np.median(region, 1, keepdims=True), axis=-1) > 30
    near = {
        name: (stands_out & (np.linalg.norm(region - color, axis=-1) < 60)).sum()
        for name, color in LIGHTS.items()
        if color is not None
    }
    light = max(near, key=near.get)
    light = light if near[light] > 40 else "empty sky"

    # Colour of the nearest ground, against what this sky's light makes of each land.
    ground = np.median(image[-5:].reshape(-1, 3), 0)
    daylight = SKIES[sky][2] * np.array([0.9 if kind == "hills" else 1.0 for _, kind in LANDS.values()])
    shades = daylight[:, None] * [color for color, _ in LANDS.values()]
    land = list(LANDS)[np.linalg.norm(ground - shades, axis=1).argmin()]
    return {"sky": sky, "light": light, "land": land}


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    pictures = [np.hstack([sample(generator)[0] for _ in range(8)]) for _ in range(8)]
    Image.fromarray(np.vstack(pictures)).resize((1024, 1024), Image.Resampling.BICUBIC).save(sys.argv[1])
