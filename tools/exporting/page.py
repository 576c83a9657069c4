"""Writes a trained scene as one HTML file, which shows it in a browser without a server or a network.

`sparse_field.py` bakes the scene; `page.html` is the page, with marks such as @SCENE@ where data is inserted.
"""
import base64
import gzip
import html
import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from run_nerf_helpers import to8b
from scenes.cameras import LARGEST_GAP, focus_point, normalize
from scenes.errors import UserError
from scenes.files import write_text
from tools.exporting.baking import Baking, ContractedBaking
from tools.exporting.sparse_field import BASE_LOW, BASE_RANGE, TABLE_SIDE, bake_field

TEMPLATE = Path(__file__).with_name('page.html')
# The longest side of a scene's box has at least this many steps of the grid.
MIN_RESOLUTION = 32
# A step of the grid is about this many pixels of the training views.
STEP_PIXELS = 0.6
# A point of the grid takes about this many bytes of the page.
BYTES_PER_POINT = 4.1
# If a page is too large, the next attempt aims at this share of the limit.
SAFETY = 0.93
# The data is split into parts of this many bytes, to show the progress of loading.
PART_BYTES = 3 * 2 ** 18
# The longer side of the picture that is shown while the page loads has at most this many pixels.
PREVIEW_SIZE = 400
# How far the camera may go up and down, in radians, and to and from the scene, in distances of the start.
ELEVATIONS, DISTANCES = (-1.5, 1.5), (0.2, 4.0)
# In forward-facing scenes and contracted space it stays among the training views, give or take this angle in
# radians, and closer to their distance.
ANGLE_MARGIN, FORWARD_DISTANCES, CONTRACTED_DISTANCES = 0.05, (0.6, 1.2), (0.5, 1.5)


def write_page(trained, path, size_limit_mb, say):
    """Write a page for a browser.

    Args:
      trained: a `Trained`.
      path: of the .html file.
      size_limit_mb: the file has at most this many megabytes (10⁶ bytes).
      say: called with each line for the user.
    Raises:
      UserError: scenes of this kind cannot be exported, nothing can be seen, or the limit is too low.
    """
    head, tail = TEMPLATE.read_text(encoding='utf-8').split('@DATA@')
    marks = {'TITLE': html.escape(trained.args.expname), 'PREVIEW': preview(trained),
             'BACKGROUND': '#fff' if trained.render_kwargs['white_bkgd'] else '#000'}
    for mark, text in marks.items():
        head = head.replace(f'@{mark}@', text)
    reserve = len(head.encode()) + len(tail.encode()) + 2000  # for the description of the scene
    baking = (ContractedBaking if trained.args.contract else Baking)(trained)
    field, data = fit(baking, first_resolution(baking), size_limit_mb * 1e6 - reserve, say)
    if field is None:
        raise UserError(f'{path}: the scene does not fit in {size_limit_mb:g} MB; give a larger limit')
    description = json.dumps({**layout(field, data), **views(trained)})
    page = head.replace('@SCENE@', description) + in_parts(data) + tail
    write_text(path, page)
    say(f'{path}: {len(page.encode()) / 1e6:.1f} MB')


def fit(baking, resolution, room, say):
    """Bake a scene as finely as `room` bytes of text allow, beginning with `resolution`. Returns a
    `SparseField` and the bytes of its data, or None and None if MIN_RESOLUTION is too fine."""
    while resolution >= MIN_RESOLUTION:
        field, num_points = bake_field(baking, resolution, room / BYTES_PER_POINT, say)
        if field is None:
            size = num_points * BYTES_PER_POINT
        else:
            data = pack(field)
            size = len(in_parts(data))
            if size <= room:
                return field, data
        # most points lie on surfaces, so their number grows with the square of the resolution
        resolution = int(resolution * (SAFETY * max(room, 0) / size) ** 0.5)
    return None, None


def first_resolution(baking):
    """The resolution at which a step of the grid is STEP_PIXELS pixels wide, at most `max_resolution`."""
    if baking.ndc:
        return baking.max_resolution
    scene, (low, high) = baking.scene, baking.box
    distance = np.median(np.linalg.norm(scene.poses[:, :, 3] - focus_point(scene.poses), axis=-1))
    step = STEP_PIXELS * distance / scene.hwf[2] / baking.unit
    return int(np.clip((high - low).amax().item() / step, MIN_RESOLUTION, baking.max_resolution))


def pack(field):
    """The arrays of a `SparseField` as compressed bytes, in the order in which the page's `unpack` reads
    them. Red and blue are relative to green, and all three to the point before: that takes a fifth less."""
    red, green, blue = field.base.cpu().numpy().T
    planes = [np.diff(plane, prepend=np.uint8(0)) for plane in (green, red - green, blue - green)]
    arrays = [part.cpu().numpy() for part in (field.bricks, field.opacity, field.gloss, field.basis)]
    return gzip.compress(b''.join(array.tobytes() for array in [*arrays[:2], *planes, *arrays[2:]]), mtime=0)


def in_parts(data):
    """Bytes as scripts that give them to the page."""
    parts = (data[start:start + PART_BYTES] for start in range(0, len(data), PART_BYTES))
    return '\n'.join(f"<script>addPart('{base64.b64encode(part).decode()}')</script>" for part in parts)


def layout(field, data):
    """What the page needs to know to unpack and place a `SparseField`."""
    return {'bytes': len(data), 'size': list(field.bricks.shape), 'numBricks': len(field.opacity),
            'numPoints': len(field.base), 'low': field.low.tolist(), 'spacing': field.spacing,
            'baseCode': [BASE_LOW, BASE_RANGE], 'tableSide': TABLE_SIDE}


def views(trained):
    """What the page needs to know to render the scene from the first pose of its path and others."""
    scene, kwargs = trained.scene, trained.render_kwargs
    H, W, focal = scene.hwf
    path = scene.render_poses.astype(np.float64)
    up, position, forward = normalize(path[:, :3, 1].mean(0)), path[0, :3, 3], -path[0, :3, 2]
    # the camera turns around the point of its optical axis that is closest to what the path looks at
    distance = max((focus_point(path) - position) @ forward, 1e-3)
    center = position + distance * forward
    limits = {'elevation': ELEVATIONS, 'distance': DISTANCES}
    box, near = [[0.0] * 3] * 2, 0.0
    if kwargs['ndc'] or trained.args.contract:
        limits = {**angle_limits(scene.poses[scene.i_train], position, center, up),
                  'distance': FORWARD_DISTANCES if kwargs['ndc'] else CONTRACTED_DISTANCES}
    if trained.args.contract:
        low, high = kwargs['network_fn'].encoding.aabb
        box, near = [(0.5 * (low + high)).tolist(), (0.5 * (high - low)).tolist()], float(scene.near)
    return {'center': center.tolist(), 'up': up.tolist(), 'position': position.tolist(), 'focal': focal,
            'imageSize': [W, H], 'ndc': [W, H, focal] if kwargs['ndc'] else [0, 0, 0], 'limits': limits,
            'background': [float(kwargs['white_bkgd'])] * 3, 'box': box, 'near': near}


def angle_limits(poses, position, center, up):
    """The ranges of azimuths, relative to `position`, and of elevations from which cameras [N, 3, 4] and one
    at `position` see `center`, with ANGLE_MARGIN; as in the page's `Orbit`. Azimuths have no range if cameras
    surround `center`."""
    arms = np.concatenate([poses[:, :, 3], position[None]]) - center
    across = normalize(position - center - (position - center) @ up * up)
    elevation = np.arcsin(arms @ up / np.linalg.norm(arms, axis=-1))
    limits = {'elevation': [elevation.min() - ANGLE_MARGIN, elevation.max() + ANGLE_MARGIN]}
    azimuth = np.sort(np.arctan2(arms @ np.cross(up, across), arms @ across))
    gaps = np.diff(azimuth, append=azimuth[0] + 2 * np.pi)
    before = gaps.argmax()
    if gaps[before] > LARGEST_GAP:
        first, last = azimuth[(before + 1) % len(azimuth)], azimuth[before]
        if first > last:  # the range that holds 0 contains ±pi too
            first, last = (first - 2 * np.pi, last) if last >= 0 else (first, last + 2 * np.pi)
        limits['azimuth'] = [first - ANGLE_MARGIN, last + ANGLE_MARGIN]
    return limits


def preview(trained):
    """The first frame of the path, small, as a data URL."""
    stride = max(1, -(-max(trained.scene.hwf[:2]) // PREVIEW_SIZE))
    rgb = trained.frames.render(trained.scene.render_poses[0], stride=stride).rgb
    content = iio.imwrite('<bytes>', to8b(rgb), extension='.jpg', quality=85)
    return 'data:image/jpeg;base64,' + base64.b64encode(content).decode()
