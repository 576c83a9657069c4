"""What a run shows of its progress: a held-out view, the test views with their metrics, videos of the path."""
import math
import platform
from pathlib import Path

import numpy as np
import torch

from errors import UserError, first_line
from evaluation import load_lpips, psnr, ssim, write_metrics
from outputs import (
    FrameFolder,
    color_map,
    disparity_range,
    make_folder,
    normalize_disparity,
    open_video,
    panel,
    probe_encoder,
    video_path,
)
from run_nerf_helpers import to8b

VIEW_SHARE = 0.02  # of the training time, for the held-out view
PANEL = 'held-out view/render, target, error, nearness, opacity'


def device_name(device):
    """What computes: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type} ({platform.machine()})'


class Reports:
    """Renders views and paths of a scene to files.

    Args:
      args: the options.
      scene: a `Scene`.
      frames: a function (poses, store=None) that yields a `Frame` for each pose; `store` is a `FrameFolder` or None.
      held_out: a function (pose, stride) that returns a `Frame` of every n-th pixel both ways, of both networks.
      mark: a function (poses) that returns the fingerprint of their frames.
      device: what renders.
      say: called with each line for the console.
      done: called where there is nothing to render for now.
    """

    def __init__(self, args, scene, frames, held_out, mark, device, say, done):
        self.args, self.scene, self.frames, self.held_out, self.mark = args, scene, frames, held_out, mark
        self.device, self.say = device, say
        self.done = done
        self.encoder = probe_encoder()
        if self.encoder.name != 'H.264':
            say(f'no H.264 encoder works here: videos are written as {self.encoder.name}')
        self.lpips = None  # loaded when it is first asked for

    def view(self, log, step):
        """The first held-out view to TensorBoard: PSNR, fine and coarse, and a panel that `outputs.panel` describes; of
        every n-th pixel, where all of them would cost more than VIEW_SHARE of the training time."""
        scene = self.scene
        view = [*scene.i_val, *scene.i_test, *scene.i_train][0]
        # a ray of a picture costs a third of one in training, which goes back through the networks too
        affordable = 3 * VIEW_SHARE * self.args.i_img * self.args.N_rand
        stride = math.ceil(math.sqrt(scene.H * scene.W / affordable))
        target = scene.images[view][::stride, ::stride]
        frame = self.held_out(scene.poses[view], stride)
        by_network = {'coarse': frame.rgb} if frame.rgb0 is None else {'coarse': frame.rgb0, 'fine': frame.rgb}
        log.scalars(step, {f'psnr/held-out {name}': psnr(to8b(rgb), target) for name, rgb in by_network.items()})
        log.image(step, PANEL, panel(frame, target / 255))

    def testset(self, step, folder, video=False):
        """All test views as PNGs in `folder`, and their metrics as `metrics.json` and `metrics.csv`; returns the means."""
        scene, rows = self.scene, []
        if self.lpips is None:
            with torch.random.fork_rng(devices=[]):  # building it draws numbers, which are not for training
                self.lpips, why_not = load_lpips(self.device)
            if self.lpips is None:
                self.say(why_not)
                self.lpips = False
        for index, frame in enumerate(self.path(scene.poses[scene.i_test], folder, video)):
            view = scene.i_test[index]
            image, target = to8b(frame.rgb), scene.images[view]
            rows.append({'view': int(view), 'psnr': psnr(image, target), 'ssim': ssim(image, target),
                         'lpips': self.lpips(image, target) if self.lpips else None, 'seconds': frame.seconds})
        about = {'step': step, 'width': scene.W, 'height': scene.H, 'views': len(rows),
                 'background': 'white' if self.args.white_bkgd else 'black', 'device': device_name(self.device),
                 'seed': self.args.seed}
        means = write_metrics(folder, rows, about)
        shown = ', '.join([f'PSNR {means["psnr"]:.2f} dB'] + [f'{key.upper()} {means[key]:.4f}' for key in ('ssim', 'lpips')
                                                            if means[key] is not None])
        self.say(f'step {step}: held-out {shown}, mean of {len(rows)} test views of {scene.W}×{scene.H}')
        return means

    def path(self, poses, folder, video=True):
        """Render `poses` into `folder`, going on with the frames that are missing there, and `video.mp4` and
        `video_disp.mp4` of them; yields the frames. A video that fails is reported, and not more."""
        store = FrameFolder(folder, self.mark(poses), self.scene.far)
        yield from self.frames(poses, store)
        try:
            for stem, pictures in (('video', store.colors), ('video_disp', store.disparities)) if video else ():
                with open_video(Path(folder, stem), self.encoder) as add:
                    for picture in pictures(len(poses)):
                        add(picture)
        except (OSError, RuntimeError) as error:
            self.say(f'{folder}: no video written ({first_line(error)})')

    def video(self, prefix):
        """`<prefix>rgb.mp4` and `<prefix>disp.mp4` of the scene's path, frame by frame; returns the first one's path. The
        first frame sets the range of the disparities."""
        limits, stems = None, [Path(f'{prefix}{what}') for what in ('rgb', 'disp')]
        with open_video(stems[0], self.encoder) as add_rgb, open_video(stems[1], self.encoder) as add_disp:
            for frame in self.frames(self.scene.render_poses):
                limits = limits or disparity_range(frame.disp)
                add_rgb(frame.rgb)
                add_disp(color_map(normalize_disparity(frame.disp, *limits)))
        return video_path(stems[0], self.encoder)

    def write_due(self, log, step, missing=False):
        """Whatever `--i_img`, `--i_testset` and `--i_video` ask for at this step, or only the files of it that are missing.
        What fails is reported, and not more."""
        args, folder = self.args, log.folder / f'testset_{step:06d}'
        prefix = log.folder / f'{log.folder.name}_spiral_{step:06d}_'
        if step % args.i_img == 0 and not missing:
            log.attempt('held-out view', self.view, log, step)
        if step % args.i_testset == 0 and not (missing and (folder / 'metrics.json').is_file()):
            means = log.attempt(folder, self.testset, step, folder)
            if means:
                log.wrote('test views', folder)
                log.scalars(step, {f'test/{key}': value for key, value in means.items() if value is not None})
        if step % args.i_video == 0 and not (missing and video_path(f'{prefix}disp', self.encoder).exists()):
            path = log.attempt('video', self.video, prefix)
            if path:
                log.wrote('video', path)
        self.done()

    def render_only(self, start):
        """`--render_only`: the camera path, or the test views, as numbered PNGs and videos.

        Args:
          start: steps that the networks were trained for.
        """
        args, scene = self.args, self.scene
        if min(scene.H, scene.W) < args.render_factor:
            raise UserError(f'--render_factor: found {args.render_factor}, expected at most the images\' '
                            f'{scene.W}×{scene.H}')
        poses = scene.poses[scene.i_test] if args.render_test else scene.render_poses
        folder = Path(args.basedir, args.expname, f'renderonly_{"test" if args.render_test else "path"}_{start:06d}')
        self.say(f'{len(poses)} frames after {start} steps, into {folder}')
        if args.render_test and args.render_factor <= 1:
            self.testset(start, make_folder(folder), video=True)
        else:
            seconds = [frame.seconds for frame in self.path(poses, folder) if frame.seconds is not None]
            self.say(f'{len(seconds)} frames rendered' + (f', {np.mean(seconds):.2f} s each' if seconds else '')
                     + (f'; {len(poses) - len(seconds)} were there' if len(seconds) < len(poses) else ''))
        self.say(f'images and {video_path("video", self.encoder)} are in {folder}')
        self.done()
