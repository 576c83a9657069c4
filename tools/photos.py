"""From photos or a video to a scene that can be trained: cameras, a config and a report.

    python tools/photos.py my_photos/ --datadir data/mine      # or my_video.mp4
    python run_nerf.py --config data/mine/config.txt           # --train does it at once

docs/photos.md says how to take photos and what is written. A second run continues where the first one was
stopped.
"""
import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes.errors import UserError, first_line
from scenes.files import make_folder, partial_path, remove_partial_files, write_text
from scenes.report import write_report
from tools.capture.collect import VIDEO_EXTENSIONS, find_photos, group_cameras
from tools.capture.diagnose import advice_for, explain_unplaced, findings_of, make_report
from tools.capture.model import arrays_of
from tools.capture.place import FORWARD_FACING, place_scene, view_bounds
from tools.capture.poses import MIN_PHOTOS, PoseEstimation, import_pycolmap, refine_as
from tools.capture.prepare import Prepared
from tools.capture.quality import find_faults, has_white_background
from tools.capture.write import (
    MAX_PINHOLE_ERROR,
    OUTPUTS,
    link_files,
    publish,
    training_factor,
    write_config,
    write_ply,
    write_poses_bounds,
    write_transforms,
)
from training.options import integer
from training.signals import Stopped, StopRequest

# This file of an output folder names the input that it is made of.
INPUT_NOTE = Path('colmap', 'input.txt')
RUN_NERF = Path(__file__).resolve().parent.parent / 'run_nerf.py'


class Failed(UserError):
    """Pose estimation failed; a report says why."""


class Capture:
    """Photos on their way to a scene. Each method is a step of `run`.

    Args:
      args: the options.
    """

    def __init__(self, args):
        self.args, self.datadir = args, args.datadir
        self.work = make_folder(args.datadir / INPUT_NOTE.parent)
        write_text(args.datadir / INPUT_NOTE, f'{args.input.resolve()}\n')
        remove_partial_files(self.work)
        self.prepared = Prepared(self.work, args.max_size)
        self.photos, self.ignored, self.groups = [], [], []

    def run(self, staging):
        """All steps. The results go to the folder `staging`.

        Raises:
          UserError: the input cannot be used. Failed: no cameras were found.
        """
        self.collect()
        self.sort_out()
        model = self.estimate()
        self.write(model, staging)

    def collect(self):
        """Find photos or frames, turn them upright and measure them."""
        if is_video(self.args.input):
            self.photos = self.prepared.add_video(self.args.input, self.args.num_frames)
        else:
            self.photos, self.ignored = find_photos(self.args.input, skip=self.datadir)
            self.prepared.add_photos([photo for photo in self.photos if photo.reason is None],
                                     self.args.num_threads)

    def sort_out(self):
        """Give photos that cannot be used a reason, and group the others by camera."""
        faults = find_faults({photo.name: self.prepared.qualities[photo.name] for photo in self.photos
                              if photo.reason is None})
        for photo in self.photos:
            photo.reason = photo.reason or faults.get(photo.name)
        self.groups = group_cameras([photo for photo in self.photos if photo.reason is None])
        usable = sum(len(group.photos) for group in self.groups)
        print(f'{usable} of {len(self.photos)} photos can be used; cameras: {len(self.groups)}')
        for photo in self.photos:
            if photo.reason:
                print(f'  {photo.source.name}: {photo.reason}')
        if usable < MIN_PHOTOS:
            self.fail(f'{self.args.input}: found {usable} photos that can be used, '
                      f'expected at least {MIN_PHOTOS}')

    def estimate(self):
        """The reconstruction with most photos. Photos that it lacks get a reason."""
        self.poses = PoseEstimation(self.work, self.prepared.images, self.prepared.masks, self.groups,
                                    self.args.num_threads, self.args.seed).run(is_video(self.args.input))
        for photo in self.photos:
            photo.features = self.poses.features.get(photo.name)
            photo.matches = self.poses.matches.get(photo.name)
        self.poses.views = arrays_of(self.poses.model).views if self.poses.model else []
        explain_unplaced(self.photos, self.poses)
        for photo in self.photos:
            if photo.reason and photo.features is not None:
                print(f'  {photo.source.name}: {photo.reason}')
        if self.poses.model is None:
            self.fail(f'{self.args.input}: found no cameras for these photos')
        return self.poses.model

    def fail(self, problem):
        """Write the report, and raise `Failed`."""
        title, findings = f'{self.datadir.resolve().name}: no cameras', findings_of(self.photos, [], 0.0)
        report = make_report(title, self.photos, self.ignored, self.groups, images=self.prepared.images,
                             findings=findings)
        write_report(report, self.datadir)
        raise Failed(f'{problem}. {advice_for(self.photos)} See {self.datadir / "report.html"}')

    def write(self, model, staging):
        """Place the scene, and write it."""
        arrays = arrays_of(model)
        placement = place_scene(arrays.poses, arrays.points, arrays.seen, arrays.tangents())
        errors = {view.name: view.error for view in arrays.views}
        for photo in self.photos:
            photo.error = errors.get(photo.name)
        names = list(errors)
        link_files(staging / 'images', {name: self.prepared.images / name for name in names})
        masks = {f'{Path(name).stem}.png': self.prepared.mask_path(name) for name in names}
        if any(path.is_file() for path in masks.values()):
            link_files(staging / 'masks', masks)
        make_folder(staging / 'sparse/0')
        model.write(staging / 'sparse/0')
        write_ply(staging / 'sparse_points.ply', placement.points, arrays.colors)
        write_transforms(staging / 'transforms.json', arrays.views, placement)
        factor = training_factor(arrays.views)
        llff_error = self.write_llff(model, placement, factor, staging)
        on_white = has_white_background([self.prepared.qualities[name] for name in names])
        write_config(staging / 'config.txt', self.datadir, placement, factor, on_white, llff_error)
        title = f'{self.datadir.resolve().name}: {len(arrays.views)} of {len(self.photos)} photos'
        write_report(make_report(title, self.photos, self.ignored, self.groups, arrays, placement,
                                 self.prepared.images,
                                 findings_of(self.photos, arrays.views, arrays.error)), staging)
        self.summary = (f'{title}; reprojection error {arrays.error:.2f} pixels; {placement.scene_type}; '
                        f'near {placement.near:.3g}, far {placement.far:.3g}')

    def write_llff(self, model, placement, factor, staging):
        """Write poses_bounds.npy for a forward-facing scene of one camera, unless its lens distorts too much.

        Returns:
          the mean reprojection error in pixels, None if it was not written.
        """
        if placement.scene_type != FORWARD_FACING or model.num_cameras() != 1:
            return None
        arrays = arrays_of(refine_as('SIMPLE_PINHOLE', model, False, self.args.num_threads)[0])
        if arrays.error / factor > MAX_PINHOLE_ERROR:
            return None
        placed = place_scene(arrays.poses, arrays.points, arrays.seen, arrays.tangents())
        bounds = view_bounds(placed.poses, placed.points, arrays.seen)
        write_poses_bounds(staging / 'poses_bounds.npy', placed.poses, bounds, arrays.views[0])
        return arrays.error


def is_video(path):
    return path.suffix.lower() in VIDEO_EXTENSIONS and not path.is_dir()


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', type=Path, help='folder of photos, searched with its subfolders, or a video')
    parser.add_argument('--datadir', type=Path,
                        help='folder to write (default: data/ and the name of the input)')
    parser.add_argument('--train', action='store_true', help='train at once')
    parser.add_argument('--num_frames', type=integer(3), default=120,
                        help='video: number of frames, the sharpest of each window of time (default: 120)')
    parser.add_argument('--max_size', type=integer(64), default=1600,
                        help='reduce photos whose longer side has more pixels (default: 1600)')
    parser.add_argument('--num_threads', type=integer(1), default=os.cpu_count(), help='default: all cores')
    parser.add_argument('--seed', type=integer(0), default=0, help='random seed (default: 0)')
    args = parser.parse_args(argv)
    source = args.input.resolve()
    args.datadir = args.datadir or Path('data', source.stem if is_video(source) else source.name)
    return args


def check_paths(args):
    """Raise UserError if the input is missing, or would be overwritten."""
    if not args.input.exists():
        raise UserError(f'{args.input}: no such file or folder, expected photos or a video')
    if args.input.is_file() and not is_video(args.input):
        raise UserError(f'{args.input}: found a file, expected a folder of photos or a video '
                        f'({" ".join(VIDEO_EXTENSIONS)})')
    source, target = args.input.resolve(), args.datadir.resolve()
    if source.is_dir() and (source == target or target in source.parents):
        raise UserError(f'--datadir: found {args.datadir}, which holds the photos; expected another folder, '
                        'which will be written')
    note, work = target / INPUT_NOTE, target / INPUT_NOTE.parent
    if note.is_file():
        if note.read_text(encoding='utf-8').strip() != str(source):
            raise UserError(f'--datadir: found {args.datadir}, which is made of '
                            f'{note.read_text(encoding="utf-8").strip()}; expected another folder')
    elif work.exists() or any(OUTPUTS.fullmatch(path.name) for path in target.glob('*')):
        raise UserError(f'--datadir: found {args.datadir}, which holds another scene; expected a new folder, '
                        'or one that this command has written')


def run(args, stop):
    """Run the steps, and move the results to their places when all are complete; returns the summary."""
    capture = Capture(args)
    staging = partial_path(capture.work / 'result')
    staging.mkdir()
    try:
        with stop.interruptible():
            capture.run(staging)
        publish(staging, args.datadir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return capture.summary


def main(argv=None):
    """Run the program; returns 0, 2 for errors that the user can fix, 128 + n for signal n."""
    args = parse_args(argv)
    try:
        check_paths(args)
        import_pycolmap()  # first, because it takes over SIGTERM
        with StopRequest(say) as stop:
            summary = run(args, stop)
    except Stopped as stopped:
        return stopped.exit_code
    except (UserError, OSError) as error:
        problem = first_line(error)
        if isinstance(error, OSError) and error.filename:
            problem = f'{error.filename}: {error.strerror}'
        print(f'photos.py: error: {problem}', file=sys.stderr)
        return 2
    config = args.datadir / 'config.txt'
    print(f'{summary}\nReport: {args.datadir / "report.html"}\nTrain:  python run_nerf.py --config {config}',
          flush=True)
    if args.train:  # takes the place of this process, so that it gets the signals
        os.execv(sys.executable, [sys.executable, str(RUN_NERF), '--config', str(config)])
    return 0


def say(message):
    print(message, file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
