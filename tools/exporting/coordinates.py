"""The coordinates of exported files: those of the input, before the scene was placed for training."""
import json

import numpy as np

from scenes.cameras import homogeneous
from scenes.files import write_text


class Coordinates:
    """A similarity transform from the scene to what is written.

    Args:
      scene: a `Scene`.
      keep: write the coordinates of the scene, those of training, instead of the input's.
    Attributes:
      from_scene: [4, 4].
      scale: a length of the scene times this is one in the files.
    """

    def __init__(self, scene, keep=False):
        applied = scene.applied_transform
        self.name = 'scene' if keep else 'input'
        self.from_scene = np.eye(4) if keep or applied is None else np.linalg.inv(applied)
        self.scale = float(np.cbrt(np.linalg.det(self.from_scene[:3, :3])))

    def points(self, points):
        """Points [..., 3] of the scene, moved."""
        return points @ self.from_scene[:3, :3].T + self.from_scene[:3, 3]

    def directions(self, directions):
        """Unit vectors [..., 3] of the scene, turned."""
        return directions @ self.from_scene[:3, :3].T / self.scale

    def poses(self, poses):
        """c2w [N, 3, 4] of the scene, moved: [N, 4, 4]."""
        moved = self.from_scene @ homogeneous(poses.astype(np.float64))
        moved[:, :3, :3] /= self.scale  # positions alone are scaled
        return moved

    def write(self, path, **about):
        """Write `<path>.json`: how to get from the file at `path` to the coordinates of training, and what
        else there is to say about it."""
        about = {'coordinates': self.name, 'to_scene': np.linalg.inv(self.from_scene).tolist(), **about}
        write_text(path.with_name(f'{path.name}.json'), json.dumps(about, indent=1) + '\n')
