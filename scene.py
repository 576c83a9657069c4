"""A scene in memory: 8-bit images, cameras and bounds, and the random rays that training draws from it."""
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from cameras import check_poses, focus_point
from errors import UserError
from file_io import read_array
from load_blender import load_blender_images, path_around, read_frames, read_json
from load_llff import load_llff_files, place_poses
from run_nerf_helpers import pixel_rays


@dataclass
class Scene:
    """What training and rendering need to know of a scene.

    images: uint8 [N, H, W, 3], composited; None for a scene known from a checkpoint alone.  H, W: their size.
    alphas: uint8 [N, H, W], where the images have alpha and an option uses it.
    poses: float32 [N, 3, 4] c2w.  K: float64 [3, 3] in pixels.  near, far: bounds along a ray, in units of rays_d.
    render_poses: float32 [M, 3, 4].  i_train, i_val, i_test: indices.
    """
    images: np.ndarray | None
    H: int
    W: int
    poses: np.ndarray
    K: np.ndarray
    near: float
    far: float
    render_poses: np.ndarray
    i_train: np.ndarray
    i_val: np.ndarray
    i_test: np.ndarray
    alphas: np.ndarray | None = None

    @property
    def hwf(self):
        return [self.H, self.W, float(self.K[0, 0])]

    def cameras(self):
        """All but the images, as plain numbers and tensors."""
        arrays = ('poses', 'K', 'render_poses', 'i_train', 'i_val', 'i_test')
        return {'H': self.H, 'W': self.W, 'near': self.near, 'far': self.far,
                **{key: torch.as_tensor(getattr(self, key)) for key in arrays}}


    def has_cameras_of(self, camera):
        """Whether these are the cameras of a checkpoint, where it has any."""
        if 'poses' not in camera:
            return True
        known = {key: np.asarray(camera[key]) for key in ('H', 'W', 'K', 'poses')}
        return all(value.shape == np.shape(getattr(self, key)) and np.allclose(value, getattr(self, key), atol=1e-4)
                   for key, value in known.items())


def scene_of_checkpoint(args, camera):
    """The scene of a checkpoint, without images: enough to render its path, or that of `--render_poses`."""
    known = {field.name: camera[field.name] for field in fields(Scene) if field.name not in ('images', 'alphas')}
    scene = Scene(None, **{key: value.numpy() if torch.is_tensor(value) else value for key, value in known.items()})
    scene.near = scene.near if args.near is None else args.near
    scene.far = scene.far if args.far is None else args.far
    if args.render_poses:
        scene.render_poses = read_render_poses(args.render_poses)
    return scene


def load_scene(args):
    """Load the scene that the options name.

    Raises:
      UserError: files missing, damaged or not matching each other; near ≥ far; no image left to train on.
    """
    scene = {'blender': _blender_scene, 'llff': _llff_scene}[args.dataset_type](args)
    if args.near is not None:
        scene.near = args.near
    if args.far is not None:
        scene.far = args.far
    if scene.near >= scene.far:
        raise UserError(f'{args.datadir}: found near {scene.near:g} and far {scene.far:g}, expected near < far')
    if uses_ndc(args) and (scene.near < 0 or scene.far > 1):
        raise UserError(f'--near, --far: found {scene.near:g} and {scene.far:g}, expected 0 to 1 in normalised device '
                        'coordinates; give --no_ndc for bounds in units of the scene')
    if args.lindisp and scene.near <= 0 and not uses_ndc(args):
        raise UserError(f'--lindisp: found near {scene.near:g}, expected more than 0')
    if len(scene.i_train) == 0:
        raise UserError(f'{args.datadir}: found no training view')
    warn_of_misfits(args, scene)
    if args.render_poses:
        scene.render_poses = read_render_poses(args.render_poses)
    return scene


def uses_ndc(args):
    """Whether rays go through normalised device coordinates: only forward-facing (llff) scenes do."""
    return args.dataset_type == 'llff' and not args.no_ndc


def warn_of_misfits(args, scene):
    """Name what makes fog of a scene: bounds that miss what the cameras look at, NDC for cameras that look all around."""
    if args.dataset_type == 'blender':
        distances = np.linalg.norm(scene.poses[:, :, 3] - focus_point(scene.poses), axis=-1)
        middle = float(np.median(distances))
        if not scene.near < middle < scene.far:
            warnings.warn(f'the cameras look at a point {middle:.3g} away, but samples lie between {scene.near:g} and '
                          f'{scene.far:g}: give --near and --far', stacklevel=2)
    if uses_ndc(args):
        agreement = np.linalg.norm(scene.poses[:, :, 2].mean(0))  # 1 if all cameras look the same way
        if args.spherify or agreement < 0.5:
            warnings.warn('the cameras look inwards from all around, which normalised device coordinates cannot hold: '
                          'give --no_ndc --spherify --lindisp', stacklevel=2)


def _blender_scene(args):
    frames = read_frames(args.datadir, args.testskip, args.llffhold)
    images, alphas, K = load_blender_images(frames, args.half_res, args.white_bkgd)
    if not (args.random_bkgd or args.occupancy_grid or args.i_embed == 1):
        alphas = None
    elif args.random_bkgd and alphas is None:
        warnings.warn(f'{args.datadir}: no image has transparent pixels: --random_bkgd changes nothing', stacklevel=2)
    i_train, i_val, i_test = frames.i_split
    render_poses = path_around(frames)[:, :3]
    return Scene(images, *images.shape[1:3], frames.poses[:, :3], K, 2.0, 6.0, render_poses, i_train, i_val, i_test,
                 alphas)


def _llff_scene(args):
    images, poses, bds = load_llff_files(args.datadir, args.factor, args.white_bkgd)
    poses, bds, render_poses, i_central = place_poses(poses, bds, spherify=args.spherify)
    H, W, focal = poses[0, :, 4].astype(np.float64)
    K = np.array([[focal, 0, 0.5 * W], [0, focal, 0.5 * H], [0, 0, 1]])
    views = np.arange(len(images))
    i_test = views[::args.llffhold] if args.llffhold > 0 else np.array([i_central])
    near, far = (0.0, 1.0) if uses_ndc(args) else (float(bds.min()) * 0.9, float(bds.max()))
    return Scene(images, *images.shape[1:3], poses[:, :, :4], K, near, far, render_poses[:, :, :4],
                 np.setdiff1d(views, i_test), i_test, i_test)


def read_render_poses(path):
    """A camera path from a .npy or .json file: c2w matrices [N, 3 or 4, 4], or the frames of a transforms file, in the
    coordinates of the scene as it is loaded (an llff scene is centred and scaled).

    Returns float32 [N, 3, 4].

    Raises:
      UserError: not such a file, or not finite.
    """
    path = Path(path)
    if path.suffix.lower() == '.json':
        poses = read_json(path)
        try:
            if isinstance(poses, dict):
                poses = [frame['transform_matrix'] for frame in poses['frames']]
            poses = np.array(poses, np.float64)
        except (TypeError, KeyError, ValueError, OverflowError):
            raise UserError(f'{path}: found no matrices, expected c2w matrices [N, 3 or 4, 4]') from None
    else:
        poses = read_array(path)
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)) or not len(poses):
        raise UserError(f'{path}: found an array of shape {list(poses.shape)}, expected c2w matrices [N, 3 or 4, 4]')
    check_poses(poses, lambda index: f'{path}: pose {index}')
    return poses[:, :3].astype(np.float32)


class RayBatcher:
    """Draws pixels of the training views at random and makes the rays through them, and no others.

    The images stay 8 bit on the device. Pixels are drawn with replacement from torch's own random state there, so this
    object has no state of its own.

    Args:
      scene: a `Scene`.
      N_rand: rays of a batch.
      no_batching: draw all rays of a batch from one image.
      precrop_iters, precrop_frac: up to this step only the middle of the images is seen, this much of each side.
      pixel_centers: rays through pixel centres.
      device: where batches are made.
      with_alpha: colours are followed by the pixel's alpha, where the images have it.
    """

    def __init__(self, scene, N_rand, no_batching, precrop_iters, precrop_frac, pixel_centers, device, with_alpha=False):
        first, last = min(scene.i_train), max(scene.i_train)  # a slice, which on a CPU is no copy
        self.images = torch.from_numpy(scene.images[first:last + 1]).to(device)           # [., H, W, 3] uint8
        self.poses = torch.from_numpy(scene.poses[first:last + 1]).to(device)             # [., 3, 4]
        with_alpha = with_alpha and scene.alphas is not None
        self.alphas = torch.from_numpy(scene.alphas[first:last + 1]).to(device) if with_alpha else None  # [., H, W] uint8
        self.views = torch.from_numpy(np.asarray(scene.i_train) - first).to(device)       # [N]
        self.K, self.device = scene.K, device
        self.N_rand, self.no_batching = N_rand, no_batching
        self.share = 1.0  # of the rays of a step, where other processes draw the others
        self.precrop_iters, self.precrop_frac = precrop_iters, precrop_frac
        self.shift = 0.5 if pixel_centers else 0.0

    def window(self, side, step):
        """The range of pixels along an image side that `step` draws from."""
        if step >= self.precrop_iters:
            return 0, side
        half = max(1, int(side // 2 * self.precrop_frac))
        return max(0, side // 2 - half), min(side, side // 2 + half)

    def draw(self, step):
        """Rays [2, N_rand, 3] (origins, directions) and their colours [N_rand, 3] for training step `step` ≥ 1;
        with alpha [N_rand, 4]."""
        def random(low, high, count=self.N_rand):
            return torch.randint(low, high, (count,), device=self.device)

        N, (H, W) = len(self.views), self.images.shape[1:3]
        view = self.views[random(0, N, 1).expand(self.N_rand) if self.no_batching else random(0, N)]
        y, x = random(*self.window(H, step)), random(*self.window(W, step))
        dtype = self.poses.dtype
        rays = pixel_rays(x.to(dtype) + self.shift, y.to(dtype) + self.shift, self.K, self.poses[view])
        colors = self.images[view, y, x]
        if self.alphas is not None:
            colors = torch.cat([colors, self.alphas[view, y, x][:, None]], -1)
        return torch.stack(rays), colors.to(dtype) / 255
