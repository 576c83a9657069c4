"""Cameras: image sizes, intrinsics and lens distortion; and poses, which are c2w matrices in OpenGL axes,
with columns right, up, back and position."""
import functools
from dataclasses import dataclass

import numpy as np

from scenes.errors import UserError

# Newton's method stops when the distortion of what it has found differs from what it looks for by less than
# this, in focal lengths.
UNDISTORT_TOLERANCE = 1e-12
# It takes at most this many steps.
UNDISTORT_STEPS = 50
# It has failed if the difference is larger than this afterwards.
MAX_UNDISTORT_ERROR = 1e-6
# Directions of this many pixels are computed at once.
PIXELS_AT_ONCE = 2 ** 20
# Cameras surround a scene if the angle between neighbouring azimuths is at most this, in radians: a little
# more than that of four cameras.
LARGEST_GAP = np.radians(100)


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera model. Views that are taken with the same camera share one object.

    Attributes:
      H, W: image size in pixels.
      K: intrinsics in pixels, float64 [3, 3]; the upper left corner of the image is at (0, 0).
      distortion: k1, k2, k3, k4, p1, p2 as in a transforms file; None if there is no distortion. The radial
        part is 1 + k1 r² + k2 r⁴ + k3 r⁶ + k4 r⁸; p1 and p2 are OpenCV's.
      fisheye: r is the angle to the optical axis rather than its tangent (OpenCV's fisheye model, without p1
        and p2).
    """
    H: int
    W: int
    K: np.ndarray
    distortion: tuple | None = None
    fisheye: bool = False

    @property
    def is_pinhole(self):
        """Whether straight lines are straight in the image."""
        return self.distortion is None and not self.fisheye

    def undistorted(self):
        """The pinhole camera of the same size and intrinsics."""
        return self if self.is_pinhole else Camera(self.H, self.W, self.K)

    def reduced(self, factor):
        """The camera whose pixels are `factor` times as wide and high; the rest of the image is dropped."""
        if factor == 1:
            return self
        K = self.K / [[factor], [factor], [1]]
        return Camera(self.H // factor, self.W // factor, K, self.distortion, self.fisheye)

    def resized(self, height, width):
        """The camera for images that were scaled to another size; itself for its own."""
        if (height, width) == (self.H, self.W):
            return self
        scale = np.array([[width / self.W], [height / self.H], [1]])
        return Camera(height, width, self.K * scale, self.distortion, self.fisheye)

    def with_size(self, height, width):
        """The camera for frames of another size with the same vertical field of view: they show more or less
        at the sides. Itself for its own size."""
        if (height, width) == (self.H, self.W):
            return self
        scale = height / self.H
        K = self.K * [[scale], [scale], [1]]
        K[0, 2] += 0.5 * (width - scale * self.W)
        return Camera(height, width, K, self.distortion, self.fisheye)

    @property
    def fov(self):
        """The vertical field of view in degrees, of the pinhole camera."""
        return float(np.degrees(2 * np.arctan(0.5 * self.H / self.K[1, 1])))

    def directions(self, x, y):
        """Directions of rays in the camera's axes.

        Args:
          x, y: image coordinates in pixels [...].
        Returns:
          float64 [..., 3]: with z = -1, or of unit length for a fisheye camera.
        Raises:
          UserError: no direction leads to one of the positions, because the distortion is too strong there.
        """
        x, y = (x - self.K[0, 2]) / self.K[0, 0], (y - self.K[1, 2]) / self.K[1, 1]
        if self.fisheye:
            radius = np.hypot(x, y)
            angle = undistort_angles(radius, self.distortion or (0,) * 6)
            scale = np.divide(np.sin(angle), radius, out=np.ones_like(radius), where=radius > 0)
            return np.stack([x * scale, -y * scale, -np.cos(angle)], -1)
        if self.distortion is not None:
            x, y = undistort(x, y, self.distortion)
        return np.stack([x, -y, np.full_like(x, -1.0)], -1)

    def pixels(self, directions):
        """The inverse of `directions`: where directions [..., 3] meet the image, x and y in pixels [...].

        The results mean nothing behind a pinhole camera, and where lens distortion does not apply, far
        outside the image.
        """
        x, y, depth = np.moveaxis(directions * [1, -1, -1], -1, 0)
        with np.errstate(divide='ignore', invalid='ignore', over='ignore'):
            if self.fisheye:
                radius = np.hypot(x, y)
                angle = np.arctan2(radius, depth)
                scale = np.where(radius > 0, distort_angles(angle, self.distortion or (0,) * 6) / radius, 1)
                x, y = x * scale, y * scale
            else:
                x, y = x / depth, y / depth
                if self.distortion is not None:
                    x, y = distort(x, y, self.distortion)
            return self.K[0, 2] + self.K[0, 0] * x, self.K[1, 2] + self.K[1, 1] * y

    @functools.lru_cache(maxsize=2)  # noqa: B019 - few cameras are kept
    def pixel_directions(self, pixel_centers):
        """The directions of all pixels' corners, or centres: float32 [H * W, 3]. The latest ones are kept."""
        directions = np.empty((self.H * self.W, 3), np.float32)
        for start in range(0, len(directions), PIXELS_AT_ONCE):
            pixels = np.arange(start, min(start + PIXELS_AT_ONCE, len(directions)))
            x, y = pixels % self.W + 0.5 * pixel_centers, pixels // self.W + 0.5 * pixel_centers
            directions[pixels] = self.directions(x, y)
        return directions


def camera_of_fov(fov, H, W):
    """The pinhole camera with a vertical field of view of `fov` degrees."""
    focal = 0.5 * H / np.tan(np.radians(fov) / 2)
    return Camera(H, W, np.array([[focal, 0, 0.5 * W], [0, focal, 0.5 * H], [0, 0, 1]]))


def sizes_of(cameras):
    """The image sizes of cameras in words."""
    sizes = sorted({(camera.W, camera.H) for camera in cameras})
    text = [f'{width}×{height}' for width, height in (sizes[0], sizes[-1])]
    return text[0] if len(sizes) == 1 else f'{len(sizes)} sizes, {text[0]} to {text[1]}'


def camera_table(cameras):
    """Cameras as numbers, float64 [N, 13]: H, W, fx, fy, cx, cy, distortion, fisheye."""
    rows = [[camera.H, camera.W, *camera.K[(0, 1, 0, 1), (0, 1, 2, 2)], *(camera.distortion or [0] * 6),
             camera.fisheye] for camera in cameras]
    return np.array(rows, np.float64).reshape(-1, 13)


def cameras_from_table(table):
    """The cameras of a `camera_table`; equal rows share an object."""
    cameras = {}
    for row in map(tuple, table.tolist()):
        H, W, fx, fy, cx, cy, *distortion, fisheye = row
        if row not in cameras:
            cameras[row] = Camera(int(H), int(W), np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]),
                                  tuple(distortion) if any(distortion) else None, bool(fisheye))
    return [cameras[tuple(row)] for row in table.tolist()]


def distort(x, y, distortion):
    """Positions [...] in the image plane of a pinhole camera to those of one with lens distortion; NumPy
    arrays or tensors."""
    k1, k2, k3, k4, p1, p2 = distortion
    rr = x * x + y * y
    radial = 1 + rr * (k1 + rr * (k2 + rr * (k3 + rr * k4)))
    return (x * radial + 2 * p1 * x * y + p2 * (rr + 2 * x * x),
            y * radial + p1 * (rr + 2 * y * y) + 2 * p2 * x * y)


def undistort(x_distorted, y_distorted, distortion):
    """The positions in the image plane whose distortion leads to the given ones, by Newton's method; [...]
    each. Raises UserError if there are none."""
    k1, k2, k3, k4, p1, p2 = distortion
    x, y = x_distorted.copy(), y_distorted.copy()
    with np.errstate(all='ignore'):  # checked below
        for _ in range(UNDISTORT_STEPS):
            error_x, error_y = (found - wanted for found, wanted in zip(distort(x, y, distortion),
                                                                        (x_distorted, y_distorted)))
            error = max(np.abs(error_x).max(initial=0), np.abs(error_y).max(initial=0))
            rr = x * x + y * y
            radial = 1 + rr * (k1 + rr * (k2 + rr * (k3 + rr * k4)))
            slope = k1 + rr * (2 * k2 + rr * (3 * k3 + rr * 4 * k4))  # of `radial` by rr
            # the matrix of derivatives is symmetric
            xx = radial + 2 * x * x * slope + 2 * p1 * y + 6 * p2 * x
            xy = 2 * x * y * slope + 2 * p1 * x + 2 * p2 * y
            yy = radial + 2 * y * y * slope + 6 * p1 * y + 2 * p2 * x
            determinant = xx * yy - xy * xy
            if not error > UNDISTORT_TOLERANCE:
                break
            x = x - (yy * error_x - xy * error_y) / determinant
            y = y - (xx * error_y - xy * error_x) / determinant
        # beyond the fold of the image there are other solutions
        check_solution(error, (radial > 0) & (determinant > 0))
    return x, y


def distort_angles(angle, distortion):
    """Angles [...] to the optical axis of a fisheye camera to distances from its centre in the image
    plane."""
    k1, k2, k3, k4 = distortion[:4]
    tt = angle * angle
    return angle * (1 + tt * (k1 + tt * (k2 + tt * (k3 + tt * k4))))


def undistort_angles(radius, distortion):
    """The angles to the optical axis of a fisheye camera at distances `radius` [...] from its centre in the
    image plane, by Newton's method. Raises UserError if there are none."""
    k1, k2, k3, k4 = distortion[:4]
    angle = np.minimum(radius, np.pi / 2)
    with np.errstate(all='ignore'):  # checked below
        for _ in range(UNDISTORT_STEPS):
            tt = angle * angle
            difference = distort_angles(angle, distortion) - radius
            slope = 1 + tt * (3 * k1 + tt * (5 * k2 + tt * (7 * k3 + tt * 9 * k4)))
            error = np.abs(difference).max(initial=0)
            if not error > UNDISTORT_TOLERANCE:
                break
            angle = angle - difference / slope
        check_solution(error, (angle >= 0) & (angle <= np.pi) & (slope > 0))
    return angle


def check_solution(error, valid):
    """Raise UserError if Newton's method has failed: its error is too large, or solutions are not `valid`
    [...]."""
    if not (error < MAX_UNDISTORT_ERROR and np.all(valid)):
        raise UserError('found a lens distortion (k1, …) that cannot be inverted at the borders of the '
                        'image, expected smaller numbers; crop or undistort the images')


def normalize(x):
    """The vector `x` scaled to unit length."""
    return x / np.linalg.norm(x)


def viewmatrix(back, up, position):
    """c2w [3, 4] of a camera at `position` whose z axis is along `back`, and whose y axis is as close to `up`
    as possible."""
    back = normalize(back)
    right = normalize(np.cross(up, back))
    return np.stack([right, normalize(np.cross(back, right)), back, position], 1)


def homogeneous(poses):
    """Poses [..., 3, 4 or more] as [..., 4, 4], with the row 0, 0, 0, 1 below; further columns are
    dropped."""
    last = np.broadcast_to(np.array([0, 0, 0, 1], poses.dtype), (*poses.shape[:-2], 1, 4))
    return np.concatenate([poses[..., :3, :4], last], -2)


def check_poses(poses, where):
    """Check that matrices can be c2w.

    Args:
      poses: [N, 3 or 4, 4 or more].
      where: function of the index of a pose that names it in the error message.
    Raises:
      UserError: a pose has NaN or infinity, or its axes are degenerate: |det| is not between 0.1 and 10.
    """
    finite = np.isfinite(poses).all((1, 2))
    if not finite.all():
        raise UserError(f'{where(np.argmin(finite))}: found NaN or infinity in the pose')
    volume = np.abs(np.linalg.det(poses[:, :3, :3].astype(np.float64)))
    valid = (volume > 0.1) & (volume < 10)
    if not valid.all():
        index = np.argmin(valid)
        raise UserError(f'{where(index)}: found a pose with determinant {volume[index]:.3g}, '
                        'expected a rotation')


def focus_point(poses):
    """The point [3] closest to the optical axes of all cameras [N, 3 or 4, 4 or more], by least squares."""
    axes, origins = poses[:, :3, 2:3], poses[:, :3, 3:4]
    project = np.eye(3) - axes * np.transpose(axes, (0, 2, 1))  # onto the plane perpendicular to each axis
    normal = np.transpose(project, (0, 2, 1)) @ project
    return (np.linalg.pinv(normal.mean(0)) @ (project @ origins).mean(0))[:, 0]


def within(values, wave):
    """Numbers that follow a sine `wave` [M], with the mean and standard deviation of `values` [N], but inside
    their range; [M]."""
    return (values.mean() + np.sqrt(2) * values.std() * wave).clip(values.min(), values.max())


def orbit_of_cameras(poses, count=40):
    """A path around the point that the cameras look at, at their mean height and mean distance from the
    vertical axis through it; [count, 4, 4] float32.

    It is a circle or, if the cameras leave out more than LARGEST_GAP of it, an ellipse in the middle of them:
    what is behind may never have been photographed.
    """
    poses = poses.astype(np.float64)
    up, focus = normalize(poses[:, :3, 1].sum(0)), focus_point(poses)
    arms = poses[:, :3, 3] - focus
    height = (arms @ up).mean()
    radius = np.linalg.norm(arms - (arms @ up)[:, None] * up, axis=-1).mean()
    across = normalize(np.cross(up, np.eye(3)[np.argmin(np.abs(up))]))  # any direction perpendicular to up
    ahead = np.cross(up, across)
    turn = np.linspace(0, 2 * np.pi, count + 1)[:-1]
    azimuths, levels = turn, np.full(count, height)
    covered = np.sort(np.arctan2(arms @ ahead, arms @ across))
    gaps = np.diff(covered, append=covered[0] + 2 * np.pi)
    if gaps.max() > LARGEST_GAP:
        covered = np.concatenate([covered[gaps.argmax() + 1:], covered[:gaps.argmax() + 1] + 2 * np.pi])
        azimuths, levels = within(covered, np.sin(turn)), within(arms @ up, np.cos(turn))
    path = []
    for azimuth, level in zip(azimuths, levels, strict=True):
        arm = radius * (np.cos(azimuth) * across + np.sin(azimuth) * ahead) + level * up
        path.append(homogeneous(viewmatrix(arm, up, focus + arm)))
    if not np.isfinite(path).all():
        raise UserError('found cameras that are all in one place, expected cameras around a scene')
    return np.stack(path).astype(np.float32)
