"""Ray-trace the demo scene, a lighthouse on a small island, into a data set in the Blender layout.

    python tools/make_demo_scene.py                       # writes data/demo, the scene that ships
    python tools/make_demo_scene.py --out /tmp/big --size 400 --train 100

The scene is a signed distance function, sphere-traced with NumPy: textures (stripes, planks, sand), occlusion
(trees and house behind the tower, a boat behind the island) and highlights that move with the camera (sea,
buoy, lantern). The same arguments give the same images on every run.
"""
import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes.cameras import Camera, homogeneous, viewmatrix
from scenes.images import write_image

# Cameras have this horizontal field of view in radians, as in the NeRF synthetic scenes.
CAMERA_ANGLE_X = 0.6911112070083618
# Cameras are at this distance from the origin, as in the NeRF synthetic scenes.
RADIUS = 4.0
# All surfaces lie within this distance of the origin.
SCENE_RADIUS = 1.7
# This unit vector points towards the sun.
SUN = np.array([0.45, -0.55, 0.70]) / np.linalg.norm([0.45, -0.55, 0.70])
# Sunlight has this colour.
SUN_COLOR = np.array([1.00, 0.93, 0.80])
# Ambient light from above has this colour.
SKY_COLOR = np.array([0.62, 0.76, 0.95])
# Ambient light from below has this colour.
GROUND_COLOR = np.array([0.45, 0.40, 0.36])
# The surface of the sea is at this height.
SEA_LEVEL = -0.30


# --- signed distances of points [N, 3]: [N], negative inside ------------------------------------------------

def sd_sphere(p, center, radius):
    return np.linalg.norm(p - center, axis=-1) - radius


def sd_ellipsoid(p, center, radii):
    """A lower bound on the distance, sufficient for sphere tracing."""
    q = (p - center) / radii
    k0 = np.linalg.norm(q, axis=-1)
    k1 = np.linalg.norm(q / radii, axis=-1)
    return k0 * (k0 - 1) / np.maximum(k1, 1e-6)


def sd_box(p, center, half, rounding=0.0):
    q = np.abs(p - center) - (np.asarray(half) - rounding)
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0) - rounding


def sd_profile(radial, z, bottom, top, r_bottom, r_top, rounding=0.0):
    """A vertical frustum; `radial` is the distance [N] from its axis."""
    slope = (r_bottom - r_top) / (top - bottom)
    side = (radial - (r_bottom - slope * (z - bottom))) / np.sqrt(1 + slope * slope)
    q = np.stack([side, np.abs(z - (bottom + top) / 2) - (top - bottom) / 2], -1) + rounding
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0) - rounding


def sd_frustum(p, center, bottom, top, r_bottom, r_top, rounding=0.0):
    radial = np.hypot(p[:, 0] - center[0], p[:, 1] - center[1])
    return sd_profile(radial, p[:, 2], bottom, top, r_bottom, r_top, rounding)


def rotate_z(p, center, degrees):
    """`p` in the coordinates of a frame at `center`, rotated by `degrees` about z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    q = p - center
    return np.stack([c * q[:, 0] + s * q[:, 1], -s * q[:, 0] + c * q[:, 1], q[:, 2]], -1)


# --- the shapes in the scene --------------------------------------------------------------------------------

class Shape(NamedTuple):
    distance: Callable   # [N, 3] -> [N]
    albedo: Callable     # [N, 3] -> [N, 3]
    specular: float = 0.05
    shininess: float = 12.0
    ripples: float = 0.0  # how far waves tilt the normal, which breaks up the highlight


def plain(r, g, b):
    def albedo(p):
        return np.broadcast_to(np.array([r, g, b]), p.shape)
    return albedo


def blend(mask, inside, outside):
    """Mix two colours by a mask [N] in [0, 1]."""
    return mask[:, None] * np.asarray(inside) + (1 - mask[:, None]) * np.asarray(outside)


def soft_step(x, width):
    return np.clip(x / width + 0.5, 0, 1)


# The lighthouse stands here.
TOWER = np.array([-0.22, 0.12, 0.0])
# The house stands here.
HOUSE = np.array([0.26, -0.12, 0.02])
# The buoy floats here.
BUOY = np.array([0.42, -0.80, -0.22])
# The boat floats here.
BOAT = np.array([-0.72, -0.52, -0.27])


def sea_distance(p):
    return sd_frustum(p, (0, 0), -0.55, SEA_LEVEL, 1.15, 1.15, 0.05)


def sea_albedo(p):
    radial = np.hypot(p[:, 0], p[:, 1])
    x, y = p[:, 0], p[:, 1]
    wave = 0.5 + 0.5 * np.sin(9 * x + 3 * np.sin(4 * y)) * np.sin(8 * y + 2 * np.sin(5 * x))
    water = blend(np.clip((radial - 0.62) / 0.5, 0, 1), [0.05, 0.27, 0.52], [0.16, 0.58, 0.70])
    water = water * (0.88 + 0.24 * wave[:, None])
    layers = blend(soft_step(np.sin(60 * p[:, 2]), 0.8), [0.80, 0.66, 0.44], [0.66, 0.50, 0.32])
    return blend(soft_step(p[:, 2] - (SEA_LEVEL - 0.09), 0.02), water, layers)


def island_distance(p):
    hill = sd_ellipsoid(p, np.array([0, 0.02, -0.30]), np.array([0.72, 0.62, 0.30]))
    rock = sd_ellipsoid(p, np.array([-0.30, 0.16, -0.22]), np.array([0.36, 0.34, 0.26]))
    k = 0.12  # the width of a smooth union, which joins rock and hill
    h = np.clip(0.5 + 0.5 * (rock - hill) / k, 0, 1)
    return rock * (1 - h) + hill * h - k * h * (1 - h)


def island_albedo(p):
    x, y = p[:, 0], p[:, 1]
    speckle = np.sin(31 * x + 5 * np.sin(17 * y)) * np.sin(29 * y + 4 * np.sin(23 * x))
    grass = blend(0.5 + 0.5 * speckle, [0.36, 0.62, 0.20], [0.25, 0.50, 0.16])
    shore = SEA_LEVEL + 0.10 + 0.02 * np.sin(9 * np.arctan2(p[:, 1], p[:, 0]))
    path = np.abs(p[:, 1] - 0.10 + 0.28 * p[:, 0] + 0.03 * np.sin(14 * p[:, 0]))
    on_path = soft_step(0.05 - path, 0.03) * soft_step(p[:, 0] + 0.2, 0.05)
    ground = blend(on_path, [0.78, 0.66, 0.46], grass)
    return blend(soft_step(p[:, 2] - shore, 0.03), ground, [0.90, 0.79, 0.55])


def tower_distance(p):
    return sd_frustum(p, TOWER, -0.15, 0.72, 0.20, 0.125)


def tower_albedo(p):
    stripes = soft_step(np.sin((p[:, 2] + 0.17) * np.pi / 0.149), 0.25)
    color = blend(stripes, [0.82, 0.12, 0.10], [0.95, 0.92, 0.84])
    angle = np.arctan2(p[:, 1] - TOWER[1], p[:, 0] - TOWER[0])
    door = soft_step(0.32 - np.abs(angle), 0.08) * soft_step(0.16 - p[:, 2], 0.02)
    return blend(door, [0.22, 0.16, 0.30], color)


def gallery_distance(p):
    deck = sd_frustum(p, TOWER, 0.70, 0.75, 0.19, 0.19, 0.015)
    radial = np.hypot(p[:, 0] - TOWER[0], p[:, 1] - TOWER[1])
    rail = np.hypot(radial - 0.175, p[:, 2] - 0.84) - 0.014
    base = sd_frustum(p, TOWER, -0.22, -0.10, 0.25, 0.23, 0.02)
    return np.minimum(np.minimum(deck, rail), base)


def lantern_distance(p):
    return sd_frustum(p, TOWER, 0.75, 0.93, 0.10, 0.10, 0.01)


def lantern_albedo(p):
    angle = np.arctan2(p[:, 1] - TOWER[1], p[:, 0] - TOWER[0])
    frame = soft_step(np.abs(np.sin(3 * angle)) - 0.25, 0.2)
    return blend(frame, [1.00, 0.80, 0.25], [0.25, 0.20, 0.20])


def roof_distance(p):
    cone = sd_frustum(p, TOWER, 0.92, 1.12, 0.155, 0.012)
    return np.minimum(cone, sd_sphere(p, TOWER + [0, 0, 1.14], 0.035))


def house_distance(p):
    return sd_box(rotate_z(p, HOUSE, 25), 0.0, [0.15, 0.11, 0.12], 0.01)


def house_albedo(p):
    q = rotate_z(p, HOUSE, 25)
    planks = 0.92 + 0.08 * np.sin(q[:, 2] * 170)
    wall = np.array([0.96, 0.84, 0.58]) * planks[:, None]
    beside_window = np.minimum(np.abs(q[:, 0] - 0.06), np.abs(q[:, 0] + 0.06))
    side = np.where(np.abs(q[:, 0]) > 0.148, np.abs(q[:, 1]), beside_window)
    window = soft_step(0.032 - side, 0.012) * soft_step(0.035 - np.abs(q[:, 2] - 0.02), 0.012)
    return blend(window, [0.16, 0.30, 0.46], wall)


def house_roof_distance(p):
    q = rotate_z(p, HOUSE + [0, 0, 0.12], 25)
    slope = (np.abs(q[:, 1]) * 0.66 + q[:, 2] * 0.75) - 0.105
    return np.maximum(np.maximum(slope, -q[:, 2] - 0.005), np.abs(q[:, 0]) - 0.18)


def house_roof_albedo(p):
    q = rotate_z(p, HOUSE, 25)
    tiles = soft_step(np.sin(q[:, 2] * 150) * 0.6 + np.sin(q[:, 0] * 110) * 0.4, 1.2)
    return blend(tiles, [0.76, 0.33, 0.20], [0.58, 0.22, 0.14])


# Each tree has a position x, y and a height.
TREES = [(0.10, 0.34, 0.34), (0.30, 0.28, 0.27), (-0.10, -0.36, 0.30), (0.50, 0.14, 0.24)]


def trees_distance(p):
    distance = np.full(len(p), 1e3)
    for x, y, height in TREES:
        for level in range(2):  # two stacked cones make a fir
            foot = -0.09 + 0.40 * height * level
            radius = 0.46 * height * (1 - 0.25 * level)
            distance = np.minimum(distance, sd_frustum(p, (x, y), foot, foot + 0.75 * height, radius, 0.01))
    return distance


def trees_albedo(p):
    needles = 0.5 + 0.5 * np.sin(44 * p[:, 0]) * np.sin(47 * p[:, 1]) * np.sin(38 * p[:, 2])
    return blend(needles, [0.13, 0.46, 0.25], [0.07, 0.31, 0.19])


def buoy_distance(p):
    return sd_sphere(p, BUOY, 0.16)


def buoy_albedo(p):
    band = soft_step(np.sin(4 * np.arctan2(p[:, 1] - BUOY[1], p[:, 0] - BUOY[0]) + 0.6), 0.3)
    cap = soft_step(p[:, 2] - BUOY[2] - 0.12, 0.015)
    return blend(cap, [0.98, 0.80, 0.15], blend(band, [0.93, 0.38, 0.08], [0.96, 0.94, 0.90]))


def boat_distance(p):
    q = rotate_z(p, BOAT, 35)
    hull = np.maximum(sd_ellipsoid(q, np.array([0, 0, 0.02]), np.array([0.22, 0.095, 0.10])), q[:, 2] - 0.03)
    mast = sd_frustum(q, (0.02, 0), 0.0, 0.46, 0.014, 0.010)
    return np.minimum(hull, mast)


def sail_distance(p):
    q = rotate_z(p, BOAT, 35)
    belly = q[:, 1] - 0.035 * np.cos(6 * q[:, 0] + 0.6)
    triangle = np.maximum(np.maximum(q[:, 0] + 0.4 * q[:, 2] - 0.19, -q[:, 0] + 0.005), 0.075 - q[:, 2])
    return np.maximum(triangle, np.abs(belly) - 0.012) * 0.8


def sail_albedo(p):
    stripe = soft_step(np.sin((p[:, 2] - BOAT[2]) * 34), 0.4)
    return blend(stripe, [0.20, 0.38, 0.72], [0.97, 0.95, 0.90])


# The scene consists of these shapes.
SCENE = [
    Shape(sea_distance, sea_albedo, specular=0.8, shininess=14.0, ripples=0.035),
    Shape(island_distance, island_albedo),
    Shape(tower_distance, tower_albedo, specular=0.20, shininess=24.0),
    Shape(gallery_distance, plain(0.33, 0.33, 0.38), specular=0.3, shininess=30.0),
    Shape(lantern_distance, lantern_albedo, specular=0.9, shininess=60.0),
    Shape(roof_distance, plain(0.72, 0.10, 0.10), specular=0.5, shininess=30.0),
    Shape(house_distance, house_albedo),
    Shape(house_roof_distance, house_roof_albedo),
    Shape(trees_distance, trees_albedo),
    Shape(buoy_distance, buoy_albedo, specular=1.0, shininess=50.0),
    Shape(boat_distance, plain(0.45, 0.24, 0.14), specular=0.3, shininess=24.0),
    Shape(sail_distance, sail_albedo),
]


def scene_distance(p):
    """Distance to the nearest shape, [N, 3] -> [N]."""
    return np.min([shape.distance(p) for shape in SCENE], axis=0)


# --- ray tracing --------------------------------------------------------------------------------------------

def march(origins, directions, near, far, steps=90):
    """Sphere-trace rays [N, 3]; returns the hit mask [N] and the distance along each ray [N]."""
    t = np.full(len(origins), near)
    hit = np.zeros(len(origins), bool)
    active = np.arange(len(origins))
    for _ in range(steps):
        distance = scene_distance(origins[active] + t[active, None] * directions[active])
        hit[active] = distance < 1e-3
        t[active] += np.where(hit[active], 0, 0.85 * distance)
        active = active[~hit[active] & (t[active] < far)]
        if active.size == 0:
            break
    return hit, t


def normals(p, eps=2e-3):
    """Unit gradient of the distance, by finite differences at the corners of a tetrahedron."""
    corners = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    gradient = sum(corner * scene_distance(p + eps * corner)[:, None] for corner in corners)
    return gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)


def sunlight(p, n, steps=28):
    """The share of sunlight that reaches each point, from the narrowest gap on the way (soft shadows)."""
    light, t = np.ones(len(p)), np.full(len(p), 0.02)
    start = p + 0.01 * n
    for _ in range(steps):
        gap = scene_distance(start + t[:, None] * SUN)
        light = np.minimum(light, np.clip(10 * gap / t, 0, 1))
        t = t + np.clip(gap, 0.02, 0.2)
    return light


def ambient_occlusion(p, n):
    """The share of ambient light that reaches each point, from the distances at a few points above it."""
    occlusion = np.zeros(len(p))
    for k in range(1, 5):
        reach = 0.05 * k
        occlusion += np.clip(reach - scene_distance(p + reach * n), 0, None) * 0.6 ** k
    return np.clip(1 - 4.0 * occlusion, 0, 1)


def shade(p, directions):
    """Colours in sRGB [N, 3] of surface points seen along `directions`."""
    nearest = np.argmin([shape.distance(p) for shape in SCENE], axis=0)
    albedo, specular, shininess, ripples = np.zeros_like(p), *np.zeros((3, len(p)))
    for index, shape in enumerate(SCENE):
        on_shape = nearest == index
        albedo[on_shape] = shape.albedo(p[on_shape])
        specular[on_shape], shininess[on_shape] = shape.specular, shape.shininess
        ripples[on_shape] = shape.ripples
    n = normals(p)
    x, y = p[:, 0], p[:, 1]
    tilt = np.stack([np.sin(11 * x + 5 * y), np.sin(10 * y - 6 * x), np.zeros(len(p))], -1)
    wavy = n + (ripples * (n[:, 2] > 0.9))[:, None] * tilt
    wavy /= np.linalg.norm(wavy, axis=-1, keepdims=True)

    sun, occlusion = sunlight(p, n), ambient_occlusion(p, n)
    diffuse = np.clip(wavy @ SUN, 0, 1) * sun
    sky = 0.5 + 0.5 * n[:, 2]
    ambient = blend(sky, SKY_COLOR, GROUND_COLOR) * occlusion[:, None]
    reflected = directions - 2 * (directions * wavy).sum(-1, keepdims=True) * wavy
    highlight = np.clip(reflected @ SUN, 0, 1) ** shininess * sun * specular
    fresnel = specular * np.clip(1 + (directions * wavy).sum(-1), 0, 1) ** 4 * occlusion
    linear = albedo ** 2.2 * (1.35 * diffuse[:, None] * SUN_COLOR + 0.75 * ambient)
    linear = linear + 0.8 * highlight[:, None] * SUN_COLOR + 0.35 * fresnel[:, None] * SKY_COLOR
    return np.clip(linear, 0, 1) ** (1 / 2.2)


def render_view(c2w, size, samples, distortion=None):
    """Render RGBA uint8 [size, size, 4], straight alpha, from `samples`² rays spread over each pixel."""
    focal = 0.5 * size / np.tan(0.5 * CAMERA_ANGLE_X)
    K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    grid = (np.arange(size * samples) + 0.5) / samples
    d = Camera(size, size, K, distortion).directions(*np.meshgrid(grid, grid)).reshape(-1, 3)
    d = d @ c2w[:3, :3].T
    d /= np.linalg.norm(d, axis=-1, keepdims=True)
    o = np.broadcast_to(c2w[:3, 3], d.shape)

    hit, t = march(o, d, near=RADIUS - SCENE_RADIUS, far=RADIUS + SCENE_RADIUS)
    color = np.zeros_like(d)
    color[hit] = shade(o[hit] + t[hit, None] * d[hit], d[hit])

    per_pixel = (size, samples, size, samples)
    coverage = hit.reshape(per_pixel).sum((1, 3)).astype(float)
    rgb = color.reshape(*per_pixel, 3).sum((1, 3)) / np.maximum(coverage, 1)[..., None]
    rgba = np.concatenate([rgb, coverage[..., None] / samples ** 2], -1)
    return np.round(255 * rgba).astype(np.uint8)


# --- cameras ------------------------------------------------------------------------------------------------

def look_at_origin(azimuth, elevation):
    """c2w [4, 4] of a camera at RADIUS that looks at the origin, in OpenGL axes (x right, y up, -z forward).
    Angles are in radians."""
    back = np.append(np.cos(elevation) * np.array([np.cos(azimuth), np.sin(azimuth)]), np.sin(elevation))
    return homogeneous(viewmatrix(back, [0.0, 0.0, 1.0], RADIUS * back))


def hemisphere(count, offset):
    """c2w of `count` cameras on a golden-angle spiral, spread evenly by area between 6° and 72° of elevation;
    `offset` rotates the spiral, in multiples of that angle."""
    k = np.arange(count) + 0.5
    azimuth = (k + offset) * np.pi * (3 - np.sqrt(5))
    lowest, highest = np.sin(np.radians([6, 72]))
    elevation = np.arcsin(lowest + (highest - lowest) * k / count)
    return [look_at_origin(a, e) for a, e in zip(azimuth, elevation)]


def write_split(out, split, poses, size, samples, distortion):
    """Render the images of a split and write them with their `transforms_<split>.json`."""
    (out / split).mkdir(parents=True, exist_ok=True)
    frames = []
    with ProcessPoolExecutor() as pool:
        images = pool.map(partial(render_view, size=size, samples=samples, distortion=distortion), poses)
        progress = tqdm(images, desc=split, total=len(poses), disable=None)
        for index, (c2w, image) in enumerate(zip(poses, progress)):
            write_image(out / split / f'r_{index}.png', image)
            frames.append({'file_path': f'./{split}/r_{index}', 'transform_matrix': c2w.round(9).tolist()})
    keys = dict(zip(('k1', 'k2', 'k3', 'k4', 'p1', 'p2'), distortion or ()))
    text = json.dumps({'camera_angle_x': CAMERA_ANGLE_X, **keys, 'frames': frames}, indent=1)
    (out / f'transforms_{split}.json').write_text(text + '\n', encoding='utf-8')


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('data/demo'), help='folder to write')
    parser.add_argument('--size', type=int, default=128, help='width and height of an image, pixels')
    parser.add_argument('--samples', type=int, default=3, help='rays along each side of a pixel')
    parser.add_argument('--train', type=int, default=80, help='number of training views')
    parser.add_argument('--val', type=int, default=2, help='number of validation views')
    parser.add_argument('--test', type=int, default=8, help='number of test views')
    parser.add_argument('--distortion', type=float, nargs=6, metavar=('K1', 'K2', 'K3', 'K4', 'P1', 'P2'),
                        help='of the lens; none by default')
    args = parser.parse_args()
    for split, offset in (('train', 0.0), ('val', 0.37), ('test', 0.71)):
        write_split(args.out, split, hemisphere(getattr(args, split), offset), args.size, args.samples,
                    args.distortion and tuple(args.distortion))


if __name__ == '__main__':
    main()
