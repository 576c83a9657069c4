"""Camera poses: c2w matrices in OpenGL axes, whose columns are right, up, back and the position."""
import numpy as np


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


def focus_point(poses):
    """The point [3] nearest to the optical axes of all cameras, in the least squares sense."""
    axes, origins = poses[:, :3, 2:3], poses[:, :3, 3:4]
    away = np.eye(3) - axes * np.transpose(axes, (0, 2, 1))  # projects off the axis
    normal = np.transpose(away, (0, 2, 1)) @ away
    return (np.linalg.pinv(normal.mean(0)) @ (away @ origins).mean(0))[:, 0]
