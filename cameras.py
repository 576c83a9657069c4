"""Camera poses: c2w matrices in OpenGL axes, whose columns are right, up, back and the position."""
import numpy as np

from errors import UserError


def normalize(x):
    return x / np.linalg.norm(x)


def look(back, up, position):
    """c2w [3, 4] of a camera whose z axis is along `back` and whose y axis is as near to `up` as can be."""
    back = normalize(back)
    right = normalize(np.cross(up, back))
    return np.stack([right, normalize(np.cross(back, right)), back, position], 1)


def homogeneous(poses):
    """[..., 3, 4 or more] to [..., 4, 4]."""
    last = np.broadcast_to(np.array([0, 0, 0, 1], poses.dtype), (*poses.shape[:-2], 1, 4))
    return np.concatenate([poses[..., :3, :4], last], -2)


def check_poses(poses, where):
    """Refuse camera matrices [N, 3 or 4, 4 or more] that cannot be c2w; `where(index)` names the one that is wrong.

    Raises:
      UserError: NaN, infinity, or axes that do not span space.
    """
    finite = np.isfinite(poses).all((1, 2))
    if not finite.all():
        raise UserError(f'{where(np.argmin(finite))}: found NaN or infinity in the pose')
    volume = np.abs(np.linalg.det(poses[:, :3, :3].astype(np.float64)))
    sound = (volume > 0.1) & (volume < 10)
    if not sound.all():
        index = np.argmin(sound)
        raise UserError(f'{where(index)}: found a pose of determinant {volume[index]:.3g}, expected a rotation')


def focus_point(poses):
    """The point [3] nearest to the optical axes of all cameras, in the least squares sense."""
    axes, origins = poses[:, :3, 2:3], poses[:, :3, 3:4]
    away = np.eye(3) - axes * np.transpose(axes, (0, 2, 1))  # projects off the axis
    normal = np.transpose(away, (0, 2, 1)) @ away
    return (np.linalg.pinv(normal.mean(0)) @ (away @ origins).mean(0))[:, 0]
