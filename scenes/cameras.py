"""Camera poses: c2w matrices in OpenGL axes, with columns right, up, back and position."""
import numpy as np

from scenes.errors import UserError


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
