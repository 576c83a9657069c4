"""Evaluation during and after training: a held-out view, test views with metrics, videos of the camera
path."""
import math
import platform
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from run_nerf_helpers import to8b
from scenes.cameras import sizes_of
from scenes.errors import UserError, first_line
from training.metrics import corrected_half, load_lpips, psnr, ssim, write_metrics
from training.outputs import (
    FrameFolder,
    color_map,
    comparison_image,
    disparity_range,
    normalize_disparity,
    open_video,
    probe_encoder,
    video_path,
)
from training.signals import Stopped

# Rendering the held-out view takes at most about this fraction of the training time, if steps have --N_rand
# rays.
VIEW_FRACTION = 0.02
# Rendering a ray costs at most this fraction of training on it: training adds a backward pass, cheap if
# sparse.
RENDER_COST = 0.6
# What metrics are of, by --appearance and --refine_poses.
MEASURED = {(False, False): 'whole views',
            (True, False): 'right half, after fitting colours to the left',
            (False, True): 'whole views, after fitting their poses to them',
            (True, True): 'right half, after fitting pose and colours to the left'}
# TensorBoard shows the comparison image of the held-out view under this name.
IMAGE_NAME = 'held-out view/render, target, error, disparity, opacity'


def device_name(device):
    """The name of the GPU, or the type of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type} ({platform.machine()})'


class Evaluator:
    """Renders views and camera paths to files. With several processes, rank 0 evaluates and the others render
    frames for it; every rank makes the same calls.

    Args:
      args: the options.
      scene: a `Scene`.
      frames: a `FrameRenderer`.
      processes: a `Processes`.
      say: called with each line for the console.
    """

    def __init__(self, args, scene, frames, processes, say):
        self.args, self.scene, self.frames, self.processes, self.say = args, scene, frames, processes, say
        if processes.is_main:
            self.encoder = probe_encoder()
            if self.encoder.name != 'H.264':
                say(f'H.264 is not available: videos are written as {self.encoder.name}')

    # --- during training ---

    def run_if_due(self, step, logger):
        """Write what --i_img, --i_testset and --i_video call for after step `step`. A failure (such as a full
        disk) is reported and training continues; a signal to stop ends it at once."""
        with suppress(Stopped):
            self._run(self._due(step), step, logger)

    def run_missing(self, step, logger):
        """After resuming from step `step`: write the test views and the video of that step if they are
        missing."""
        if step > 0:
            with suppress(Stopped):
                self._run(self._due(step) - {'view'}, step, logger, only_missing=True)

    def _due(self, step):
        args = self.args
        intervals = {'view': args.i_img, 'video': args.i_video}
        if len(self.scene.i_test):
            intervals['test views'] = args.i_testset
        return {name for name, interval in intervals.items() if step % interval == 0}

    def _run(self, due, step, logger, only_missing=False):
        if not due:
            return
        self.frames.drop_cache()  # of the networks of an earlier step
        if not self.processes.is_main:  # rank 0 alone knows which files exist
            self.frames.serve()
            return
        testset_folder = logger.folder / f'testset_{step:06d}'
        video_stem = logger.folder / f'{logger.folder.name}_spiral_{step:06d}_'
        if only_missing and (testset_folder / 'metrics.json').is_file():
            due = due - {'test views'}
        if only_missing and video_path(f'{video_stem}disp', self.encoder).exists():
            due = due - {'video'}
        try:
            if 'view' in due:
                self._attempt('held-out view', self.log_view, step, logger)
            if 'test views' in due:
                means = self._attempt(testset_folder, self.write_testset, step, testset_folder)
                if means is not None:
                    logger.record_output('test views', testset_folder)
                    measured = {f'test/{key}': mean for key, mean in means.items() if mean is not None}
                    logger.scalars(step, measured)
            if 'video' in due:
                path = self._attempt('video', self.write_video, video_stem)
                if path is not None:
                    logger.record_output('video', path)
        finally:
            self.processes.release()

    def _attempt(self, what, make, *arguments):
        """`make(*arguments)`, or None after reporting that there is no disk space, memory or encoder for
        it."""
        try:
            return make(*arguments)
        except (OSError, RuntimeError, UserError) as error:
            self.say(f'{what}: not written ({first_line(error)}); training continues')
            return None

    # --- the outputs ---

    def log_view(self, step, logger):
        """Log the first held-out view to TensorBoard: PSNR of each network, and a `comparison_image`. Only
        every n-th pixel in both directions is rendered if more would exceed VIEW_FRACTION of the training
        time."""
        scene = self.scene
        view = [*scene.i_val, *scene.i_test, *scene.i_train][0]
        affordable_rays = VIEW_FRACTION / RENDER_COST * self.args.i_img * self.args.N_rand
        camera = scene.cameras[view]
        stride = math.ceil(math.sqrt(camera.H * camera.W / affordable_rays))
        target = scene.images[view][::stride, ::stride]
        mask = None if scene.masks is None else scene.masks[view][::stride, ::stride]
        frame = self.frames.render_view(scene.poses[view], stride, camera)
        colors = {'coarse': frame.rgb} if frame.rgb0 is None else {'coarse': frame.rgb0, 'fine': frame.rgb}
        psnrs = {f'psnr/held-out {name}': psnr(to8b(rgb), target, mask) for name, rgb in colors.items()}
        logger.scalars(step, {name: value for name, value in psnrs.items() if value is not None})
        logger.image(step, IMAGE_NAME, comparison_image(frame, target / 255))

    @cached_property
    def lpips(self):
        """LPIPS of two images, or None after saying why it is not available."""
        with torch.random.fork_rng(devices=[]):  # initialising its network must not affect training
            distance, problem = load_lpips(self.frames.device)
        if distance is None:
            self.say(problem)
        return distance

    def write_testset(self, step, folder, video=False):
        """Write all test views to `folder` as PNGs, with `metrics.json` and `metrics.csv`; returns the
        means."""
        args, scene, rows, lpips = self.args, self.scene, [], self.lpips
        device = self.frames.device if self.frames.device.type == 'cuda' else 'cpu'  # others may lack float64
        cameras = [scene.cameras[view] for view in scene.i_test]
        measured = MEASURED[args.appearance, args.refine_poses]
        frames = self.write_frames(self.test_poses(), cameras, folder, video)
        for frame, view in zip(frames, scene.i_test, strict=True):
            rgb, target = frame.rgb, scene.images[view]
            mask = None if scene.masks is None else scene.masks[view]
            if args.appearance:
                rgb, target, mask = corrected_half(rgb, target, mask)
            image = to8b(rgb)
            rows.append({'view': int(view), 'image': scene.names[view] if scene.names else None,
                         'psnr': psnr(image, target, mask), 'ssim': ssim(image, target, device, mask),
                         'lpips': lpips(image, target, mask) if lpips else None, 'seconds': frame.seconds})
        one_size = len({(camera.H, camera.W) for camera in cameras}) == 1
        about = {'step': step, 'width': cameras[0].W if one_size else None,
                 'height': cameras[0].H if one_size else None, 'views': len(rows),
                 'background': 'white' if args.white_bkgd else 'black',
                 'device': device_name(self.frames.device), 'seed': args.seed,
                 'measured': measured}
        means = write_metrics(folder, rows, about)
        figures = [] if means['psnr'] is None else [f'PSNR {means["psnr"]:.2f} dB']
        figures += [f'{key.upper()} {means[key]:.4f}' for key in ('ssim', 'lpips') if means[key] is not None]
        views = f'{len(rows)} test views of {sizes_of(cameras)}'
        views += f' ({measured})' if args.appearance or args.refine_poses else ''
        self.say(f'step {step}: held-out {", ".join(figures)}, mean of {views}')
        return means

    def test_poses(self):
        """The poses of the test views [N, 3, 4]; with --refine_poses they are aligned to their images, with
        --appearance only to the half that is not measured."""
        if self.args.refine_poses:
            return self.frames.align_views(self.scene, self.scene.i_test, left_half=self.args.appearance)
        return self.scene.poses[self.scene.i_test]

    def write_frames(self, poses, cameras, folder, video=True):
        """Render `poses` with `cameras` to `folder`, reusing equal frames that are there, and write
        `video.mp4` and `video_disp.mp4` after the last one, unless frames have several sizes. Yields the
        frames. A video that fails is only reported."""
        fingerprint = self.frames.fingerprint(poses, cameras)
        store = FrameFolder(folder, fingerprint, self.scene.far, self.args.overwrite)
        if self.args.render_only and store.reused:
            self.say(f'reusing {store.reused} frames in {folder}; --overwrite renders them again')
        yield from self.frames.render_path(poses, store, cameras)
        if video and len({(camera.H, camera.W) for camera in cameras}) > 1:
            self.say(f'{folder}: no video written (its frames have several sizes)')
            return
        try:
            for stem, images in (('video', store.colors), ('video_disp', store.disparities)) if video else ():
                with open_video(Path(folder, stem), self.encoder, self.scene.fps) as add:
                    for image in images(len(poses)):
                        add(image)
        except (OSError, RuntimeError) as error:
            self.say(f'{folder}: no video written ({first_line(error)})')

    def write_video(self, stem):
        """Write `<stem>rgb.mp4` and `<stem>disp.mp4` of the scene's camera path; returns the path of the
        former. The first frame sets the range of the disparities."""
        rgb_stem, disp_stem, limits, scene = Path(f'{stem}rgb'), Path(f'{stem}disp'), None, self.scene
        with open_video(rgb_stem, self.encoder, scene.fps) as add_rgb, \
                open_video(disp_stem, self.encoder, scene.fps) as add_disp:
            for frame in self.frames.render_path(scene.render_poses, cameras=scene.path_cameras):
                limits = limits or disparity_range(frame.disp)
                add_rgb(frame.rgb)
                add_disp(color_map(normalize_disparity(frame.disp, *limits)))
        return video_path(rgb_stem, self.encoder)

    # --- without training ---

    def render_only(self, start):
        """`--render_only`: write the camera path or the test views as numbered PNGs and videos.

        Args:
          start: number of steps the networks were trained for.
        Raises:
          UserError: there are no test views, or the frames are smaller than --render_factor.
        """
        args, scene = self.args, self.scene
        poses, cameras = scene.render_poses, scene.path_cameras
        if args.render_test:
            poses, cameras = scene.poses[scene.i_test], [scene.cameras[view] for view in scene.i_test]
        H, W = (min(sides, default=1) for sides in ([c.H for c in cameras], [c.W for c in cameras]))
        if min(H, W) < args.render_factor:
            raise UserError(f'--render_factor: found {args.render_factor}, expected at most the frames\' '
                            f'{W}×{H}')
        if len(poses) == 0:
            raise UserError(f'{args.datadir}: found no test views for --render_test')
        if not self.processes.is_main:
            self.frames.serve()
            return
        name = f'renderonly_{"test" if args.render_test else "path"}_{start:06d}'
        folder = Path(args.basedir, args.expname, name)
        self.say(f'{len(poses)} frames after {start} steps, into {folder}')
        try:
            if args.render_test and args.render_factor <= 1:
                self.write_testset(start, folder, video=True)
            else:
                if args.render_test:
                    self.say('no metrics with --render_factor: the test images are larger than the frames')
                    poses = self.test_poses()
                frames = self.write_frames(poses, cameras, folder)
                seconds = [frame.seconds for frame in frames if frame.seconds is not None]
                rate = f', {np.mean(seconds):.2f} s each' if seconds else ''
                self.say(f'{len(seconds)} frames rendered{rate}')
        finally:
            self.processes.release()
        self.say(f'the output is in {folder}')
