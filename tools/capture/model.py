"""A reconstruction of COLMAP as arrays."""
from dataclasses import dataclass

import numpy as np

from tools.capture.poses import opencv_params, placed_images


@dataclass
class View:
    """A photo with its camera."""
    name: str
    image_id: int
    width: int
    height: int
    params: np.ndarray   # fx, fy, cx, cy in pixels, k1, k2, p1, p2
    error: float         # mean reprojection error in pixels

    def intrinsics(self):
        """The keys of transforms.json for its camera."""
        keys = ('fl_x', 'fl_y', 'cx', 'cy', 'k1', 'k2', 'p1', 'p2')
        return {**dict(zip(keys, map(float, self.params))), 'w': self.width, 'h': self.height}

    def fov(self):
        """Horizontal and vertical field of view in degrees, without distortion."""
        size = np.array([self.width, self.height])
        return np.degrees(2 * np.arctan(0.5 * size / self.params[:2])).tolist()


@dataclass
class Arrays:
    """A reconstruction as arrays, sorted by the names of its N photos."""
    views: list           # N × `View`
    poses: np.ndarray     # c2w [N, 3, 4] in OpenGL axes
    points: np.ndarray    # [M, 3]
    colors: np.ndarray    # uint8 [M, 3]
    seen: list            # for each photo the indices of the points that it observes
    error: float          # mean reprojection error of all observations in pixels

    def tangents(self):
        """For each photo half its width and height at depth 1, [N, 2]."""
        return np.array([[0.5 * view.width, 0.5 * view.height] / view.params[:2] for view in self.views])


def arrays_of(model):
    """The `Arrays` of a pycolmap.Reconstruction."""
    ids = sorted(model.points3D)
    row = {point_id: index for index, point_id in enumerate(ids)}
    points = np.array([model.point3D(point_id).xyz for point_id in ids]).reshape(-1, 3)
    colors = np.array([model.point3D(point_id).color for point_id in ids], np.uint8).reshape(-1, 3)
    views, poses, seen, all_errors = [], [], [], []
    for image in placed_images(model):
        observations = [point for point in image.points2D if point.has_point3D()]
        indices = np.array([row[point.point3D_id] for point in observations], int)
        errors = reprojection_errors(image, points[indices], observations)
        camera = image.camera
        views.append(View(image.name, image.image_id, camera.width, camera.height, opencv_params(camera),
                          float(errors.mean())))
        c2w = image.cam_from_world().inverse().matrix()
        poses.append(c2w * np.array([1, -1, -1, 1]))  # COLMAP's y points down and its z forward
        seen.append(indices)
        all_errors.append(errors)
    return Arrays(views, np.array(poses), points, colors, seen, float(np.concatenate(all_errors).mean()))


def reprojection_errors(image, points, observations):
    """The distances [P] in pixels between points [P, 3] projected into an image and where they were found."""
    if not observations:
        return np.empty(0)
    w2c = image.cam_from_world().matrix()
    projected = image.camera.img_from_cam(points @ w2c[:, :3].T + w2c[:, 3], check_cheirality=False)
    return np.linalg.norm(projected - np.array([point.xy for point in observations]), axis=-1)
