"""Where a scene lies for training: up is +z, what the cameras look at is at the origin, and the typical
camera is at distance 1 from it.

    poses    c2w [N, 3, 4] in OpenGL axes: x right, y up, z back
    points   [M, 3]
    seen     list of N arrays: the indices of the points that each camera observes

They are in the arbitrary units of structure from motion until `place_scene` has placed them.
"""
from dataclasses import dataclass

import numpy as np

from scenes.cameras import focus_point, normalize

FORWARD_FACING, AROUND, ALL_AROUND, UNBOUNDED = ('forward-facing', 'around an object', 'all around',
                                                 'unbounded')
# Cameras are forward-facing if none looks further from their mean direction than this, in degrees.
FORWARD_ANGLE = 40.0
# The axes of cameras that converge pass the focus within this fraction of their distance from it (median).
CONVERGENCE = 0.3
# At least this fraction of cameras that converge have the focus in front of them.
CONVERGING_FRACTION = 0.8
# Points that are further from the focus than this multiple of the cameras' distance are background.
BACKGROUND_DISTANCE = 1.5
# A scene has a background if not even this percentage of what is observed is nearer.
BACKGROUND_PERCENTILE = 90
# Depths and boxes leave out this percentage of what is observed at each end, which may be wrong matches.
OUTLIER_PERCENT = 1.0
# This percentage of the cameras sees nothing beyond far.
FAR_PERCENTILE = 95
# A camera with fewer points than this has the depths of all cameras instead of its own.
MIN_DEPTHS = 50
# Near and far leave this fraction of the depth free before and behind what is observed.
DEPTH_MARGIN = 0.15
# The box is wider than what is observed by this fraction on each side, because plain surfaces have no points.
BOX_MARGIN = 0.25
# The faces of the box are no further from the origin than this, because its cells would be too large.
MAX_BOX = 6.0
# The right axes of level cameras lie in a plane. Their second singular value, divided by √N, is at least this
# if they determine it.
LEVEL_SPREAD = 0.17
# If the mean up axis of the cameras is shorter than this along the vertical, they look straight down.
MIN_UP = 0.1
# Number of rounds of reweighting when the focus is estimated.
FOCUS_ROUNDS = 10


@dataclass
class Placement:
    """A placed scene; `x_placed = scale * (rotation @ x + translation)`."""
    rotation: np.ndarray      # [3, 3]
    translation: np.ndarray   # [3]
    scale: float
    poses: np.ndarray         # c2w [N, 3, 4], placed
    points: np.ndarray        # [M, 3], placed
    scene_type: str
    near: float
    far: float
    aabb: np.ndarray          # [2, 3]

    def place(self, poses, points):
        """Other cameras and points of the same reconstruction, placed."""
        return transformed(poses, points, self.rotation, self.translation, self.scale)


def place_scene(poses, points, seen, tangents):
    """Place a reconstruction for training.

    Args:
      poses, points, seen: see above.
      tangents: half the width and height of each photo at depth 1, [N, 2].
    Returns:
      a `Placement`.
    """
    scene_type = find_scene_type(poses, points, seen)
    rotation = level(poses)
    focus, unit = find_focus(scene_type, poses, points, seen)
    translation, scale = -rotation @ focus, 1.0 / unit
    placed, moved = transformed(poses, points, rotation, translation, scale)
    near, far = find_bounds(placed, moved, seen)
    return Placement(rotation, translation, scale, placed, moved, scene_type, near, far,
                     find_box(scene_type, placed, moved, seen, tangents))


def transformed(poses, points, rotation, translation, scale):
    """Cameras and points after a similarity, as in `Placement`."""
    positions = scale * (poses[:, :, 3] @ rotation.T + translation)
    return (np.concatenate([rotation @ poses[:, :, :3], positions[..., None]], -1),
            scale * (points @ rotation.T + translation))


def find_scene_type(poses, points, seen):
    """One of FORWARD_FACING, AROUND, ALL_AROUND and UNBOUNDED, from unplaced cameras and points."""
    forward, positions = -poses[:, :, 2], poses[:, :, 3]
    mean_forward = normalize(forward.mean(0))
    depth = np.median(np.concatenate(depths(poses, points, seen)))
    along = np.ptp(positions @ mean_forward)
    if (forward @ mean_forward).min() > np.cos(np.radians(FORWARD_ANGLE)) and along < 0.5 * depth:
        return FORWARD_FACING
    focus = robust_focus(poses)
    if converges(poses, focus):
        radius = np.median(np.linalg.norm(positions - focus, axis=-1))
        distances = np.linalg.norm(points[np.concatenate(seen)] - focus, axis=-1)
        has_background = np.percentile(distances, BACKGROUND_PERCENTILE) > BACKGROUND_DISTANCE * radius
        return UNBOUNDED if has_background else AROUND
    spread = np.median(np.linalg.norm(positions - np.median(positions, 0), axis=-1))
    return ALL_AROUND if spread < depth else UNBOUNDED


def converges(poses, focus):
    """Whether most cameras look at the point `focus`."""
    to_focus = focus - poses[:, :, 3]
    distance = np.linalg.norm(to_focus, axis=-1)
    ahead = -(to_focus * poses[:, :, 2]).sum(-1)
    beside = np.sqrt(np.maximum(distance ** 2 - ahead ** 2, 0))
    return np.median(beside / distance) < CONVERGENCE and (ahead > 0).mean() >= CONVERGING_FRACTION


def robust_focus(poses):
    """The point [3] closest to the optical axes by the sum of distances, not of their squares: axes that pass
    far from it count less. Found by iteratively reweighted least squares."""
    axes, origins = poses[:, :, 2:3], poses[:, :, 3:4]
    project = np.eye(3) - axes * np.transpose(axes, (0, 2, 1))  # onto the plane perpendicular to each axis
    focus = focus_point(poses)[:, None]
    for _ in range(FOCUS_ROUNDS):
        distance = np.linalg.norm(project @ (focus - origins), axis=1, keepdims=True)
        weights = 1 / (distance + 1e-3 * np.median(distance) + 1e-12)
        focus = np.linalg.pinv((weights * project).mean(0)) @ (weights * (project @ origins)).mean(0)
    return focus[:, 0]


def find_focus(scene_type, poses, points, seen):
    """The point [3] that becomes the origin, and the length that becomes 1."""
    positions, depth = poses[:, :, 3], np.median(np.concatenate(depths(poses, points, seen)))
    center = np.median(positions, 0)
    if scene_type == ALL_AROUND:
        return center, np.median(np.linalg.norm(points[np.concatenate(seen)] - center, axis=-1))
    focus = robust_focus(poses)
    if scene_type == FORWARD_FACING or not converges(poses, focus):
        focus = center - depth * normalize(poses[:, :, 2].mean(0))
    return focus, np.median(np.linalg.norm(positions - focus, axis=-1))


def level(poses):
    """The rotation [3, 3] that turns up to +z, and the mean viewing direction towards +y if there is one:
    `x_placed = R @ x`.

    People hold cameras level, so up is perpendicular to their right axes. If these are all alike, up is the
    direction perpendicular to their mean that is closest to the cameras' mean up. For cameras that look down
    it is their back axis.
    """
    right = poses[:, :, 0]
    _, spread, directions = np.linalg.svd(right, full_matrices=False)
    levelled = directions[2:] if spread[1] > LEVEL_SPREAD * np.sqrt(len(right)) else directions[1:]
    for axis in (1, 2):  # up, then back
        up = poses[:, :, axis].mean(0) @ levelled.T @ levelled
        if np.linalg.norm(up) > MIN_UP:
            break
    up = normalize(up)
    forward = -poses[:, :, 2].mean(0)
    forward -= (forward @ up) * up
    if np.linalg.norm(forward) < 1e-3:
        forward = np.cross(up, np.eye(3)[np.argmin(np.abs(up))])  # any direction perpendicular to up
    forward = normalize(forward)
    return np.stack([np.cross(forward, up), forward, up])


def depths(poses, points, seen):
    """For each camera the depths of the points that it sees; those behind it are left out."""
    found = []
    for pose, indices in zip(poses, seen):
        depth = -(points[indices] - pose[:, 3]) @ pose[:, 2]
        found.append(depth[depth > 0])
    return found


def view_bounds(poses, points, seen):
    """The nearest and farthest depth of what each camera sees, but for outliers, [N, 2]. A camera that sees
    few points has those of all cameras."""
    every = depths(poses, points, seen)
    ends = [np.percentile(depth if len(depth) >= MIN_DEPTHS else np.concatenate(every),
                          [OUTLIER_PERCENT, 100 - OUTLIER_PERCENT]) for depth in every]
    return np.array(ends)


def find_bounds(poses, points, seen):
    """Near and far: what the cameras see lies between them, but for outliers. A few cameras may see farther,
    because points that are far away are often wrong."""
    near, far = view_bounds(poses, points, seen).T
    last = np.percentile(far, FAR_PERCENTILE)
    return float(near.min() * (1 - DEPTH_MARGIN)), float(last * (1 + DEPTH_MARGIN))


def find_box(scene_type, poses, points, seen, tangents):
    """The box [2, 3] around what is observed, but for outliers; with the cameras if they look outwards.

    It also holds what each photo shows at the median depth of its points, so that no ray misses the box.
    """
    observed = points[np.concatenate(seen)]
    low, high = np.percentile(observed, [OUTLIER_PERCENT, 100 - OUTLIER_PERCENT], axis=0)
    margin = BOX_MARGIN * (high - low)
    corners = frustum_corners(poses, depths(poses, points, seen), tangents)
    low, high = np.minimum(low - margin, corners.min(0)), np.maximum(high + margin, corners.max(0))
    if scene_type in (ALL_AROUND, UNBOUNDED):
        low, high = np.minimum(low, poses[:, :, 3].min(0)), np.maximum(high, poses[:, :, 3].max(0))
    return np.clip(np.stack([low, high]), -MAX_BOX, MAX_BOX)


def frustum_corners(poses, depth, tangents):
    """The corners [4 N, 3] of what cameras show at the median of their depths."""
    distance = np.array([np.median(every if len(every) else np.concatenate(depth)) for every in depth])
    signs = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    at_depth_1 = np.concatenate([signs * tangents[:, None], np.full((len(poses), 4, 1), -1.0)], -1)
    in_camera = at_depth_1 * distance[:, None, None]  # [N, 4, 3]
    return (in_camera @ poses[:, :, :3].transpose(0, 2, 1) + poses[:, None, :, 3]).reshape(-1, 3)
