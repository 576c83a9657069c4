"""A scene in memory: images, cameras and bounds, completed and checked against the options."""
import warnings
from dataclasses import dataclass, fields

import numpy as np
import torch

from scenes.cameras import (
    Camera,
    camera_table,
    cameras_from_table,
    focus_point,
)
from scenes.errors import UserError
from scenes.images import ImageSet
from scenes.paths import FPS, cameras_of_path, read_camera_path

# These fields of a `Scene` are not stored in a checkpoint.
NOT_IN_CHECKPOINT = ('images', 'alphas', 'names', 'cameras', 'masks', 'points')


@dataclass
class Scene:
    """What training and rendering need to know about a scene of N views."""
    # uint8 [N, H, W, 3] on the background, or an `ImageSet` if sizes differ; None if from a checkpoint
    images: np.ndarray | ImageSet | None
    H: int                            # height of the images in pixels, of the first one if sizes differ
    W: int                            # width
    poses: np.ndarray                 # c2w, float32 [N, 3, 4]
    K: np.ndarray                     # intrinsics of this size in pixels, float64 [3, 3]
    near: float                       # where sampling along a ray starts, in units of rays_d: depth, or
                                      # distance from a fisheye camera
    far: float                        # where it ends
    render_poses: np.ndarray          # c2w along the path of the video, float32 [M, 3, 4]
    i_train: np.ndarray               # indices of the training views
    i_val: np.ndarray                 # indices of the validation views
    i_test: np.ndarray                # indices of the test views
    # uint8 [N, H, W], or an `ImageSet`; None if the loader found or kept no transparency
    alphas: np.ndarray | ImageSet | None = None
    names: list[str] | None = None    # path of each image within the scene's folder; None if not known
    # the camera of each view; None for the pinhole camera of H, W, K
    cameras: list[Camera] | None = None
    # which pixels count, bool [N, H, W] or an `ImageSet`; None if all do
    masks: np.ndarray | ImageSet | None = None
    applied_transform: np.ndarray | None = None  # from the input's frame to that of `poses`, [4, 4]
    points: np.ndarray | None = None  # sparse points, float32 [M, 3]
    # the camera of each of `render_poses`; None for the pinhole camera of H, W, K
    path_cameras: list[Camera] | None = None
    fps: float = FPS                  # frames per second of videos

    def __post_init__(self):
        if self.cameras is None:
            self.cameras = [self.pinhole] * len(self.poses)
        if self.path_cameras is None:
            self.path_cameras = [self.pinhole] * len(self.render_poses)

    @property
    def pinhole(self):
        """The pinhole camera of H, W, K."""
        return Camera(self.H, self.W, self.K)

    @property
    def hwf(self):
        """[H, W, focal], the focal length in pixels."""
        return [self.H, self.W, float(self.K[0, 0])]

    def checkpoint_fields(self):
        """Everything but the images, as plain numbers and tensors for a checkpoint."""
        plain = {key: value for key, value in vars(self).items() if key not in NOT_IN_CHECKPOINT}
        plain['view_cameras'] = camera_table(self.cameras)
        plain['path_cameras'] = camera_table(self.path_cameras)
        for key, value in plain.items():
            if isinstance(value, (np.ndarray, np.generic)):
                plain[key] = torch.from_numpy(value) if value.ndim else value.item()
        return plain

    def has_cameras_of(self, saved):
        """Whether the cameras are those of `saved`, the `checkpoint_fields` of a checkpoint; true if it has
        none."""
        if 'poses' not in saved:
            return True
        own = self.checkpoint_fields()
        if 'view_cameras' not in saved:  # of an older version, which had one camera without distortion
            camera = Camera(saved['H'], saved['W'], np.asarray(saved['K']))
            saved = {**saved, 'view_cameras': camera_table([camera] * len(saved['poses']))}
        tolerances = {'H': 0, 'W': 0, 'K': 1e-4, 'poses': 1e-4, 'view_cameras': 1e-6}
        return all(np.shape(saved[key]) == np.shape(own[key])
                   and np.allclose(saved[key], own[key], rtol=1e-5, atol=tolerance)
                   for key, tolerance in tolerances.items())


def scene_from_checkpoint(args, saved):
    """The scene whose `checkpoint_fields` a checkpoint holds: enough to render a camera path. Raises
    UserError as `apply_options` does."""
    known = {field.name: saved[field.name] for field in fields(Scene) if field.name in saved}
    for field, table in (('cameras', 'view_cameras'), ('path_cameras', 'path_cameras')):
        if table in saved:
            known[field] = cameras_from_table(saved[table].numpy())
    known = {key: value.numpy() if torch.is_tensor(value) else value for key, value in known.items()}
    return apply_options(args, Scene(images=None, **known))


def finish_scene(args, scene):
    """Apply the options to a loaded scene, and check it.

    Raises:
      UserError: as `apply_options` does, or no view is left for training.
    """
    apply_options(args, scene)
    if args.train_views and args.train_views < len(scene.i_train):
        chosen = np.linspace(0, len(scene.i_train) - 1, args.train_views).round().astype(int)
        scene.i_train = scene.i_train[chosen]
    if len(scene.i_train) == 0:
        raise UserError(f'{args.datadir}: found no training view')
    warn_of_mismatches(args, scene)
    return scene


def apply_options(args, scene):
    """Replace near, far and the camera path by what the options give; returns the scene.

    Raises:
      UserError: near and far do not fit each other or the options, or the file of --render_poses is unusable.
    """
    if args.near is not None:
        scene.near = args.near
    if args.far is not None:
        scene.far = args.far
    if args.render_poses:
        path = read_camera_path(args.render_poses, scene.applied_transform, args.dataparser_transforms)
        scene.render_poses, scene.path_cameras = path.poses, cameras_of_path(path, scene.pinhole)
        scene.fps = path.fps or FPS
    if args.render_size:
        W, H = args.render_size
        resized = {camera: camera.with_size(H, W) for camera in set(scene.path_cameras)}
        scene.path_cameras = [resized[camera] for camera in scene.path_cameras]
    scene.fps = args.fps or scene.fps
    if scene.near >= scene.far and not args.contract:
        raise UserError(f'{args.datadir}: found near {scene.near:g} and far {scene.far:g}, '
                        'expected near < far')
    if uses_ndc(args) and (scene.near < 0 or scene.far > 1):
        raise UserError(f'--near, --far: found {scene.near:g} and {scene.far:g}, expected 0 to 1 in '
                        'normalised device coordinates; give --no_ndc for bounds in scene units')
    if args.lindisp and scene.near <= 0 and not uses_ndc(args):
        raise UserError(f'--lindisp: found near {scene.near:g}, expected more than 0')
    return scene


def uses_ndc(args):
    """Whether rays are mapped to normalised device coordinates: only those of forward-facing (llff) scenes
    are."""
    return args.dataset_type == 'llff' and not args.no_ndc


def warn_of_mismatches(args, scene):
    """Warn if near and far miss what the cameras look at, if NDC cannot represent the cameras, or if
    --random_bkgd has no effect."""
    if args.dataset_type != 'llff':  # the axes of forward-facing cameras do not meet
        distance = float(np.median(np.linalg.norm(scene.poses[:, :, 3] - focus_point(scene.poses), axis=-1)))
        if not scene.near < distance < (np.inf if args.contract else scene.far):
            warnings.warn(f'the cameras look at a point {distance:.3g} away, but samples lie between '
                          f'{scene.near:g} and {scene.far:g}: set --near and --far', stacklevel=2)
    if uses_ndc(args):
        agreement = np.linalg.norm(scene.poses[:, :, 2].mean(0))  # 1 if all cameras face the same way
        if args.spherify or agreement < 0.5:
            warnings.warn('the cameras surround the scene, which normalised device coordinates cannot '
                          'represent: set --no_ndc --spherify --lindisp', stacklevel=2)
    if args.random_bkgd and scene.alphas is None:
        warnings.warn(f'{args.datadir}: the scene was loaded without alpha, so --random_bkgd has no effect',
                      stacklevel=2)
