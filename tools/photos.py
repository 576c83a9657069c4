"""From photos or a video to a scene that can be trained: cameras, a config and a report.

    python tools/photos.py my_photos/ --datadir data/mine      # or my_video.mp4
    python run_nerf.py --config data/mine/config.txt           # --train does it at once

docs/photos.md says how to take photos and what is written. A second run continues where the first one was
stopped.
"""
import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes.errors import UserError, first_line, print_any_text
from scenes.files import make_folder, partial_path, remove_partial_files, write_text
from scenes.report import write_report
from tools.capture.collect import VIDEO_EXTENSIONS, find_photos, group_cameras, readable
from tools.capture.diagnose import advice_for, explain_unplaced, findings_of, make_report
from tools.capture.model import arrays_of
from tools.capture.place import FORWARD_FACING, place_scene, view_bounds
from tools.capture.poses import (
    MIN_PHOTOS,
    MIN_PHOTOS_TO_REFINE,
    PoseEstimation,
    import_pycolmap,
    placed_images,
    refine_as,
)
from tools.capture.prepare import Prepared
from tools.capture.quality import find_faults, has_white_background
from tools.capture.write import (
    MAX_PINHOLE_ERROR,
    OUTPUTS,
    experiment_name,
    link_files,
    mask_name,
    publish,
    training_factor,
    write_config,
    write_ply,
    write_poses_bounds,
    write_transforms,
)
from training.options import integer
from training.signals import Stopped, StopRequest

# This file of an output folder names the input that it was made from.
INPUT_NOTE = Path('colmap', 'input.txt')
RUN_NERF = Path(__file__).resolve().parent.parent / 'run_nerf.py'


class Capture:
    """Photos on their way to a scene. Each method is a step of `run`.

    Args:
      args: the options.
    """

    def __init__(self, args):
        self.args, self.datadir = args, args.datadir
        self.work = make_folder(args.datadir / INPUT_NOTE.parent)
        remove_partial_files(self.work)
        self.prepared = Prepared(self.work, args.max_size)
        self.photos, self.ignored, self.groups = [], [], []

    def run(self, staging):
        """All steps. The results go to the folder `staging`.

        Returns:
          a line on the result.
        Raises:
          UserError: the input cannot be used, or no cameras were found.
        """
        self.collect()
        self.sort_out()
        return self.write(self.estimate(), staging)

    def collect(self):
        """Find photos or frames, turn them upright and measure them."""
        if is_video(self.args.input):
            self.note_input()
            self.photos = self.prepared.add_video(self.args.input, self.args.num_frames)
        else:
            self.photos, self.ignored = find_photos(self.args.input, skip=self.datadir)
            self.note_input()
            self.prepared.add_photos([photo for photo in self.photos if photo.reason is None],
                                     self.args.num_threads)

    def note_input(self):
        """Note what the folder is made from, so that other photos are not mixed with these."""
        write_text(self.datadir / INPUT_NOTE, readable(self.args.input.resolve()) + '\n')

    def sort_out(self):
        """Give photos that cannot be used a reason, and group the others by camera."""
        faults = find_faults({photo.shown: self.prepared.quality(photo.name) for photo in self.photos
                              if photo.reason is None})
        for photo in self.photos:
            photo.reason = photo.reason or faults.get(photo.shown)
        usable = [photo for photo in self.photos if photo.reason is None]
        self.groups = group_cameras(usable)
        masks = sum(photo.mask is not None for photo in usable)
        print(f'{len(usable)} of {len(self.photos)} photos can be used; cameras: {len(self.groups)}'
              + (f'; with a mask: {masks}' if masks or (self.args.input / 'masks').is_dir() else ''))
        say_reasons(self.photos)
        if len(usable) < MIN_PHOTOS:
            self.fail(f'{self.args.input}: photos that can be used: found {len(usable)}, '
                      f'expected at least {MIN_PHOTOS}')

    def estimate(self):
        """The reconstruction with the most photos. Photos that it lacks get a reason."""
        poses = PoseEstimation(self.prepared, self.groups, self.args.num_threads,
                               self.args.seed).run(is_video(self.args.input))
        usable = [photo for photo in self.photos if photo.reason is None]
        for photo in usable:
            photo.features = poses.features.get(photo.name)
            photo.matches = poses.matches.get(photo.name)
        placed = {image.name for image in placed_images(poses.model)} if poses.model else set()
        explain_unplaced(usable, poses, placed)
        say_reasons(usable)
        if poses.model is None:
            self.fail(f'{self.args.input}: found no cameras for these photos')
        return poses.model

    def fail(self, problem):
        """Write the report, beside the database if there is an earlier result, and raise `UserError`."""
        report = make_report(f'{self.datadir.resolve().name}: no cameras', self.photos, self.ignored,
                             self.groups, findings_of(self.photos, [], 0.0), self.prepared.images)
        folder = self.work if (self.datadir / 'config.txt').exists() else self.datadir
        write_report(report, folder)
        raise UserError(f'{problem}. {advice_for(self.photos)} See {folder / "report.html"}')

    def write(self, model, staging):
        """Place the scene, and write it; returns a line on the result."""
        arrays = arrays_of(model)
        placement = place_scene(arrays.poses, arrays.points, arrays.seen, arrays.tangents())
        errors = {view.name: view.error for view in arrays.views}
        for photo in self.photos:
            photo.error = errors.get(photo.name)
        names = list(errors)
        link_files(staging / 'images', {name: self.prepared.images / name for name in names})
        masks = {mask_name(name): self.prepared.mask_path(name) for name in names
                 if self.prepared.mask_path(name).is_file()}
        if masks:
            link_files(staging / 'masks', masks)
        make_folder(staging / 'sparse/0')
        model.write(staging / 'sparse/0')
        write_ply(staging / 'sparse_points.ply', placement.points, arrays.colors)
        write_transforms(staging / 'transforms.json', arrays.views, placement, masks)
        factor = training_factor(arrays.views)
        llff_error = self.write_llff(model, placement, factor, staging)
        on_white = has_white_background([self.prepared.quality(name) for name in names])
        name = experiment_name(self.datadir, staging / 'transforms.json')
        write_config(staging / 'config.txt', self.datadir, name, placement, factor, on_white, llff_error)
        title = f'{self.datadir.resolve().name}: {len(arrays.views)} of {len(self.photos)} photos'
        findings = findings_of(self.photos, arrays.views, arrays.error)
        report = make_report(title, self.photos, self.ignored, self.groups, findings, self.prepared.images,
                             arrays, placement, ndc=llff_error is not None)
        write_report(report, staging)
        return (f'{title}; reprojection error {arrays.error:.2f} pixels; {placement.scene_type}; '
                f'near {placement.near:.3g}, far {placement.far:.3g}')

    def write_llff(self, model, placement, factor, staging):
        """Write poses_bounds.npy for a forward-facing scene of one camera, unless its lens distorts too much
        for the pinhole camera with a central principal point that the file can hold.

        Returns:
          the mean reprojection error in pixels, None if it was not written.
        """
        if (placement.scene_type != FORWARD_FACING or model.num_cameras() != 1
                or model.num_reg_images() < MIN_PHOTOS_TO_REFINE):
            return None
        arrays = arrays_of(refine_as('SIMPLE_PINHOLE', model, False, self.args.num_threads)[0])
        if arrays.error / factor > MAX_PINHOLE_ERROR:
            return None
        poses, points = placement.place(arrays.poses, arrays.points)
        bounds = view_bounds(poses, points, arrays.seen)
        write_poses_bounds(staging / 'poses_bounds.npy', poses, bounds, arrays.views[0])
        return arrays.error


def say_reasons(photos):
    """Print why photos are not used."""
    for photo in photos:
        if photo.reason:
            print(f'  {photo.shown}: {photo.reason.text}')


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
        other = note.read_text(encoding='utf-8').strip()
        if other != readable(source):
            raise UserError(f'--datadir: found {args.datadir}, which was made from {other}; expected another '
                            f'folder. If those photos were moved, delete {args.datadir / INPUT_NOTE}')
    elif (work / 'database.db').exists() or any(OUTPUTS.fullmatch(path.name) for path in target.glob('*')):
        raise UserError(f'--datadir: found {args.datadir}, which holds another scene; expected a new folder, '
                        'or one that this command has written')


def run(args, stop):
    """Run the steps, and move the results to their places when all are complete; returns a line on them."""
    capture = Capture(args)
    staging = partial_path(capture.work / 'result')
    staging.mkdir()
    try:
        with stop.interruptible():
            summary = capture.run(staging)
        publish(staging, args.datadir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return summary


def main(argv=None):
    """Run the program; returns 0, 2 for errors that the user can fix, 128 + n for signal n."""
    print_any_text()
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
        if isinstance(error, OSError):  # a full disk raises an error without a file name
            problem = f'{error.filename or args.datadir}: {error.strerror or problem}'
        print(f'photos.py: error: {problem}', file=sys.stderr)
        return 2
    config = str(args.datadir / 'config.txt')
    print(summary, f'Report: {args.datadir / "report.html"}',
          f'Train:  python run_nerf.py --config {shlex.quote(config)}', sep='\n', flush=True)
    if args.train:  # takes the place of this process, so that it gets the signals
        os.execv(sys.executable, [sys.executable, str(RUN_NERF), '--config', config])
    return 0


def say(message):
    print(message, file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
