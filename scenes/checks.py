"""Checks of a loaded scene, as a report: cameras, bounds and images that make training fail.

    python run_nerf.py --config configs/demo.txt --check_data
"""
import numpy as np

from scenes.cameras import focus_point, normalize

# A report has at most this many sparse points.
MAX_POINTS = 4000
# With fewer training views than this, novel views are poor.
MIN_VIEWS = 10
# Distances that suit the positional encoding and the hash grid, in scene units.
DISTANCES = 0.01, 100.0
# Fields of view that lenses have, in degrees; fisheye lenses have up to MAX_FISHEYE_FOV.
MIN_FOV, MAX_FOV, MAX_FISHEYE_FOV = 5.0, 150.0, 240.0
# Cameras are in one place if they are all within this fraction of the nearest distance.
MIN_BASELINE = 0.002
# The optical axes meet if they pass the focus at less than this fraction of their distance from it (median).
MAX_MISS = 0.3
# Of the sparse points that a camera sees, this fraction may lie outside the bounds.
MAX_CUT_POINTS = 0.05
# Of the cameras, this fraction may look at a point outside the bounds.
MAX_CUT_CAMERAS = 0.25
# An axis of the world is up if the cosine of its angle with the measured direction is above this.
SNAP_TO_AXIS = 0.94
# An image is blank if less than this fraction of its pixels is neither black, white nor transparent.
MIN_CONTENT = 0.005
# Values of black, or transparent, pixels are at most this; white ones are as close to 255.
BLANK_MARGIN = 12


def check_scene(scene, name, ndc=None, aabb=None):
    """Check a loaded scene.

    Args:
      scene: a `Scene` with `cameras`, and `points` or None.
      name: what the report calls it.
      ndc: whether near and far are in normalised device coordinates; by default if they are 0 and 1.
      aabb: the box that is trained, as six numbers, lowest corner first; None if it is estimated.
    Returns:
      the report, a dict for `scenes.report`. Its findings are one of level 'good' if nothing is wrong.
    """
    ndc = (scene.near, scene.far) == (0, 1) if ndc is None else ndc
    views = Views(scene, ndc)
    aabb = None if aabb is None or ndc else np.reshape(aabb, [2, 3])
    findings = [*check_counts(scene), *check_placement(views), *check_box(views, aabb), *check_lenses(views),
                *check_images(views)]
    if not findings:
        findings = [finding('good', f'No problem found in {len(views.names)} cameras, their bounds and their '
                            'images.')]
    splits = np.full(len(views.names), 'train', object)
    splits[scene.i_val], splits[scene.i_test] = 'val', 'test'
    sizes = sorted({(camera.W, camera.H) for camera in scene.cameras})
    size = f'{sizes[0][0]} × {sizes[0][1]} pixels' if len(sizes) == 1 else f'{len(sizes)} sizes'
    bounds = 'in normalised device coordinates' if ndc else f'from {scene.near:.3g} to {scene.far:.3g} units'
    distance = f'The cameras look at a point {np.median(views.depths):.3g} units away.'
    return {
        'title': f'{name}: {len(views.names)} views',
        'summary': [f'{len(scene.i_train)} views for training, {len(scene.i_test)} for testing, of {size}.',
                    f'Rays are sampled {bounds}.', *([distance] if views.converge else [])],
        'findings': findings,
        'scene': {'type': None, 'near': float(scene.near), 'far': float(scene.far), 'ndc': bool(ndc),
                  'aabb': aabb if aabb is None else aabb.tolist(), 'up': upward(views).tolist()},
        'cameras': [{'name': views.names[i], 'position': views.position[i].tolist(),
                     'forward': views.forward[i].tolist(), 'up': views.up[i].tolist(),
                     'split': splits[i], 'fov': views.fov[i].tolist()} for i in range(len(views.names))],
        'points': views.points.tolist(),
        'photos': [],
    }


class Views:
    """What the checks need to know about the N cameras of a scene, as arrays."""

    def __init__(self, scene, ndc):
        poses = np.asarray(scene.poses, np.float64)[:, :3, :4]
        self.scene, self.ndc, self.axes = scene, ndc, poses[:, :, :3]
        self.right, self.up, self.forward = poses[:, :, 0], poses[:, :, 1], -poses[:, :, 2]
        self.position = poses[:, :, 3]
        self.names = list(scene.names or [f'view {index}' for index in range(len(poses))])
        self.fov = np.array([field_of_view(camera) for camera in scene.cameras])  # [N, 2] degrees
        points = np.zeros([0, 3]) if scene.points is None else np.asarray(scene.points, np.float64)
        self.points = points[::-(-len(points) // MAX_POINTS) or 1]
        self.focus = focus_point(poses)
        arms = self.focus - self.position
        self.depths = (arms * self.forward).sum(-1)  # of the focus, along the optical axes
        distance = np.linalg.norm(arms, axis=-1)
        miss = np.sqrt(np.maximum(distance ** 2 - self.depths ** 2, 0))
        self.axes_meet = np.median(miss) < MAX_MISS * np.median(distance)
        self.converge = self.axes_meet and np.median(self.depths) > 0
        # depths of the points in the image of each camera, [N, M], in units of rays_d, which have unit length
        # for a fisheye camera; negative for points behind it that it would see in front of it, otherwise NaN
        arms = (self.points - self.position[:, None]) @ self.axes
        depth = -arms[..., 2]
        slope = np.tan(np.radians(np.minimum(self.fov, MAX_FOV)) / 2)[:, None]
        inside = (np.abs(arms[..., :2]) < slope * np.abs(depth)[..., None]).all(-1)
        fisheye = np.array([camera.fisheye for camera in scene.cameras])[:, None]
        depth = np.where(fisheye, np.sign(depth) * np.linalg.norm(arms, axis=-1), depth)
        self.point_depths = np.where(inside, depth, np.nan)

    def some(self, which):
        """The number of the views `which` [N], and the names of the first, for a sentence."""
        names = [self.names[index] for index in np.flatnonzero(which)]
        return f'{len(names)} of {len(self.names)}', ', '.join(names[:3]) + (', …' if names[3:] else '')


def finding(level, text, advice=None):
    """An entry of a report's findings."""
    return {'level': level, 'text': text, 'advice': advice}


def field_of_view(camera):
    """Horizontal and vertical field of view of a `Camera` in degrees."""
    half = np.array([camera.W / camera.K[0, 0], camera.H / camera.K[1, 1]]) / 2
    return np.degrees(2 * (half if camera.fisheye else np.arctan(half)))


def upward(views):
    """The direction that is up in the world, [3]: perpendicular to the cameras' right where they look in
    different directions, otherwise their mean up. A nearby axis of the world is preferred."""
    up = views.up.mean(0)
    if np.linalg.norm(up) < 1e-6:
        return np.array([0.0, 0.0, 1.0])
    up = normalize(up)
    spread, directions = np.linalg.eigh(views.right.T @ views.right / len(views.right))
    level = directions[:, 0] * np.sign(directions[:, 0] @ up)
    if spread[1] > 0.01 and level @ up > 0.7:
        up = level
    axis = np.argmax(np.abs(up))
    return np.sign(up[axis]) * np.eye(3)[axis] if np.abs(up[axis]) > SNAP_TO_AXIS else up


# --- checks: each yields findings ---------------------------------------------------------------------------

def check_counts(scene):
    """Few training views, no test view."""
    if len(scene.i_train) < MIN_VIEWS:
        yield finding('warning', f'Only {len(scene.i_train)} views are for training; 20 to 60 are usual.',
                      'Take more photos, or give --llffhold 0 to hold out only one.')
    if len(scene.i_test) == 0:
        yield finding('warning', 'No view is held out for testing, so quality cannot be measured.',
                      'Give --llffhold 8, or add frames to transforms_test.json.')


def check_placement(views):
    """Cameras in one place or repeated, wrong axes, unusual units, wrong bounds. What follows from a fault
    that was found is not reported again."""
    scene, ndc = views.scene, views.ndc
    extent = np.linalg.norm(views.position - np.median(views.position, 0), axis=-1).max()
    if extent < MIN_BASELINE * (1 if ndc or scene.near <= 0 else scene.near):
        yield finding('error', f'All {len(views.names)} cameras are in one place, within {extent:.2g} units: '
                      'depth cannot be learned.',
                      'Move the camera between photos, do not just turn it. If you did, check the last '
                      'column of transform_matrix.')
        return
    yield from check_duplicates(views, extent)
    axes = list(check_axes(views))
    yield from axes
    if scene.near >= scene.far:
        yield finding('error', f'near is {scene.near:g} and far is {scene.far:g}; near must be less.',
                      'Give --near and --far.')
    elif ndc and np.linalg.norm(views.forward.mean(0)) < 0.5:
        yield finding('error', 'The cameras surround the scene, which normalised device coordinates cannot '
                      'represent.', 'Give --no_ndc --spherify --lindisp.')
    elif not ndc and not any(found['level'] == 'error' for found in axes):
        yield from check_distances(views)


def check_duplicates(views, extent):
    """Training and test views that have the same pose."""
    used = np.union1d(views.scene.i_train, views.scene.i_test).astype(int)
    poses = np.concatenate([views.position / extent, views.axes.reshape(-1, 9)], -1)[used]
    _, first, index = np.unique(np.round(poses, 5), axis=0, return_index=True, return_inverse=True)
    original = first[index.reshape(-1)]
    copies = np.flatnonzero(original != np.arange(len(used)))
    if copies.size:
        a, b = views.names[used[original[copies[0]]]], views.names[used[copies[0]]]
        yield finding('warning', f'{len(copies)} of {len(used)} cameras repeat the pose of another one, such '
                      f'as {a} and {b}.', 'Remove the repeated frames, or correct their transform_matrix.')


def check_axes(views):
    """Axes that are mirrored or not a rotation, look away from what they surround, or are upside down."""
    mirrored = np.linalg.det(views.axes) < 0
    skewed = np.abs(np.swapaxes(views.axes, 1, 2) @ views.axes - np.eye(3)).max((1, 2)) > 0.02
    up = views.up.mean(0)
    against = views.up @ up < -0.5 * np.linalg.norm(up)
    ahead, behind = np.sum(views.point_depths > 0), np.sum(views.point_depths < 0)
    focus_behind = views.depths < -views.scene.near  # nearer than that, they may stand back to back
    if mirrored.any():
        count, names = views.some(mirrored)
        yield finding('error', f'{count} cameras have mirrored (left-handed) axes: {names}.',
                      'Axes must be x right, y up, z back. Negate the column of transform_matrix that points '
                      'the other way.')
    elif skewed.any():
        count, names = views.some(skewed)
        yield finding('error', f'{count} cameras have axes that are not perpendicular unit vectors: {names}.',
                      'Keep scale and shear out of the first three columns of transform_matrix.')
    elif behind > 3 * ahead if ahead + behind else views.axes_meet and focus_behind.mean() > 0.9:
        what = f'The optical axes of {views.some(focus_behind)[0]} cameras meet behind them'
        if ahead + behind:
            what = f'{behind / (ahead + behind):.0%} of the sparse points lie behind the cameras'
        yield finding('error', f'{what}: they look away from what they surround.',
                      'The axes are probably those of OpenCV (y down, z forward). Negate the second and '
                      'third column of each transform_matrix, for OpenGL axes (y up, z back).')
    elif up[2] < -0.9 * max(np.linalg.norm(up), 0.3):
        yield finding('warning', 'The cameras are upside down: on average, up is along -z.',
                      'If z is up in this scene, turn the photos by 180°, or negate the first two columns of '
                      'each transform_matrix.')
    elif against.any():
        count, names = views.some(against)
        yield finding('warning', f'{count} cameras are upside down relative to the others: {names}.',
                      'If the photos are not, negate the first two columns of their transform_matrix.')


def check_distances(views):
    """Poses in unusual units, and bounds that miss what the cameras see."""
    near, far = views.scene.near, views.scene.far
    visible = views.point_depths > 0
    depths = views.point_depths[visible]
    distance = np.median(depths if depths.size else views.depths)
    if (depths.size or views.converge) and not DISTANCES[0] < distance < DISTANCES[1]:
        yield finding('warning', f'The cameras are {distance:.4g} units from what they look at; 1 to 10 suit '
                      'training. Are positions in millimetres?',
                      f'Multiply the positions in transform_matrix by {4 / distance:.2g}; near, far and aabb '
                      'too.')
    elif depths.size:
        nearer, farther = np.mean(depths < near), np.mean(depths > far)
        if nearer + farther > MAX_CUT_POINTS:
            cut = visible & ((views.point_depths < near) | (views.point_depths > far))
            share = cut.sum(-1) / np.maximum(visible.sum(-1), 1)
            low, high = np.percentile(depths, [0.5, 99.5])
            yield finding('warning', f'The bounds cut {nearer + farther:.0%} of the sparse points: '
                          f'{nearer:.0%} are nearer than near = {near:.3g}, {farther:.0%} are farther than '
                          f'far = {far:.3g}. Worst is {views.names[np.argmax(share)]}, {share.max():.0%}.',
                          f'Give --near {0.9 * low:.2g} --far {1.1 * high:.2g}')
    elif views.converge:
        cut = (views.depths < near) | (views.depths > far)
        low, high = max(views.depths.min(), 0), views.depths.max()
        if cut.mean() > MAX_CUT_CAMERAS:
            yield finding('warning', f'{views.some(cut)[0]} cameras look at a point outside their bounds: it '
                          f'is {low:.3g} to {high:.3g} away, near is {near:.3g}, far is {far:.3g}.',
                          f'Give --near {0.5 * low:.2g} --far {1.5 * high:.2g}, or set near and far in '
                          'transforms.json.')


def check_box(views, aabb):
    """A box that misses what the cameras see."""
    if aabb is None:
        return
    seen = views.points[(views.point_depths > 0).any(0)]
    outside = ((seen < aabb[0]) | (seen > aabb[1])).any(-1)
    if len(seen) and outside.mean() > MAX_CUT_POINTS:
        low, high = np.percentile(seen, [0.5, 99.5], axis=0)
        box = ' '.join(f'{x:.3g}' for x in (*(1.1 * low - 0.1 * high), *(1.1 * high - 0.1 * low)))
        yield finding('warning', f'{outside.mean():.0%} of the sparse points lie outside the box aabb.',
                      f'Give --aabb {box}')
    elif not len(seen) and views.converge and ((views.focus < aabb[0]) | (views.focus > aabb[1])).any():
        focus = ' '.join(f'{x:.3g}' for x in views.focus)
        yield finding('warning', f'The cameras look at ({focus}), which lies outside the box aabb.',
                      'Give an --aabb that contains it, or leave it out to have it estimated.')


def check_lenses(views):
    """Fields of view that no lens has."""
    limit = np.where([camera.fisheye for camera in views.scene.cameras], MAX_FISHEYE_FOV, MAX_FOV)
    odd = (views.fov.max(-1) < MIN_FOV) | (views.fov.max(-1) > limit)
    if odd.any():
        count, names = views.some(odd)
        worst = views.fov[np.argmax(odd)]
        yield finding('error', f'{count} cameras have an unlikely field of view, such as {worst[0]:.3g}° × '
                      f'{worst[1]:.3g}°: {names}.', 'Check fl_x and fl_y (in pixels of images of w × h, not '
                      'in millimetres) or camera_angle_x (in radians).')


def check_images(views):
    """Images that show nothing."""
    scene = views.scene
    if scene.images is None:
        return
    kinds = {'black': [], 'white': [], 'transparent': []}
    for index in range(len(views.names)):
        image = scene.images[index]
        step = max(1, min(image.shape[:2]) // 100)
        image = image[::step, ::step]
        content = {'black': image.max(-1) > BLANK_MARGIN, 'white': image.min(-1) < 255 - BLANK_MARGIN}
        if scene.alphas is not None:
            content = {'transparent': scene.alphas[index][::step, ::step] > BLANK_MARGIN, **content}
        blank = [kind for kind, shown in content.items() if shown.mean() < MIN_CONTENT]
        if blank and (scene.alphas is None or blank[0] == 'transparent' or content['transparent'].all()):
            kinds[blank[0]].append(index)
    for kind, indices in kinds.items():
        if indices:
            count, names = views.some(np.isin(np.arange(len(views.names)), indices))
            yield finding('warning', f'{count} images are nearly all {kind}: {names}.',
                          'Remove these frames, or replace the images.')
