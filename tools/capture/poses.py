"""Cameras of photos by structure from motion with COLMAP (Schönberger and Frahm 2016), through pycolmap.

    colmap/database.db       features and matches, from which a second run continues
    colmap/vocabulary.bin    for more than MAX_EXHAUSTIVE photos: the visual words of their features
    colmap/pairs.txt         for a video: pairs of distant frames to match
"""
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np
from tqdm import tqdm

from scenes.errors import UserError, first_line
from scenes.files import PARTIAL, atomic_write, write_text
from tools.capture.database import forget_photos

# Up to this number of photos every photo is matched with every other.
MAX_EXHAUSTIVE = 150
# Frames of a video are matched with this number of frames after them, and with some at greater distances.
SEQUENCE_OVERLAP = 10
# Of a video this number of frames is also matched with each other, so that loops close.
MAX_KEYFRAMES = 40
# With a vocabulary tree each photo is matched with this number of photos that look alike.
SIMILAR_PHOTOS = 40
# The vocabulary that is built from the photos' own features has at most this number of words.
VOCABULARY_WORDS = 4096
# It is built from this number of features.
VOCABULARY_FEATURES = 200_000
# Each word stands for at least this number of features.
FEATURES_PER_WORD = 40
# Features are found in photos reduced to this length of their longer side, in pixels.
FEATURE_IMAGE_SIZE = 1600
# At most this number of features of a photo is kept.
MAX_FEATURES = 8192
# Two photos whose rays meet at this angle in degrees can start a reconstruction. Large angles are better, but
# photos that all face the same way have none.
INITIAL_ANGLES = (16.0, 4.0)
# A reconstruction has at least this number of photos.
MIN_PHOTOS = 3
# Global mapping is tried if incremental mapping places less than this fraction of the photos.
ENOUGH_PLACED = 0.8
# A photo with fewer points than this is not placed reliably; COLMAP asks for twice as many to place it.
MIN_POINTS = 15
# The intrinsics of a camera are refined if at least this number of its photos are placed.
MIN_PHOTOS_TO_REFINE = 6
# Observations with more than these reprojection errors are dropped in the course of refinement, in pixels of
# photos whose longer side has ERRORS_SIZE or more.
MAX_ERRORS = (4.0, 2.0)
ERRORS_SIZE = 1000
# Camera models that are refined, from simple to detailed, and whether with the principal point.
CAMERA_MODELS = (('SIMPLE_PINHOLE', False), ('SIMPLE_RADIAL', False), ('RADIAL', True), ('OPENCV', True))
# A more detailed camera model is taken if it reduces the error to less than this fraction.
MIN_GAIN = 0.99
# Points whose rays meet at less than this angle in degrees are dropped.
MIN_ANGLE = 1.5
# The principal point of a plausible camera is this close to the centre, in widths and heights.
MAX_OFF_CENTER = 0.1
# Its focal lengths in x and y differ by less than this fraction.
MAX_STRETCH = 0.01
# Its focal length is between these multiples of the longer side.
MIN_FOCAL, MAX_FOCAL = 0.2, 20.0
# No coefficient of its distortion exceeds this.
MAX_DISTORTION = 1.0
# The progress is polled at this interval, in seconds.
POLL_SECONDS = 0.2


@dataclass
class Poses:
    """The result of pose estimation. Dicts have the names of photos in the database as keys."""
    model: object = None                             # pycolmap.Reconstruction; None if it failed
    features: dict = field(default_factory=dict)     # number of features
    matches: dict = field(default_factory=dict)      # matches with all other photos
    best_match: dict = field(default_factory=dict)   # most matches with one other photo
    separate: dict = field(default_factory=dict)     # size of the unconnected reconstruction that has it
    few_points: dict = field(default_factory=dict)   # number of points, if too few to keep its pose


def import_pycolmap():
    """The module pycolmap, silenced.

    Raises:
      UserError: it is not installed, or too old.
    """
    try:
        import pycolmap
    except ImportError:
        raise UserError('pycolmap is not installed: pip install -r requirements-tools.txt') from None
    if 'CancellationToken' not in dir(pycolmap):
        raise UserError(f'found pycolmap {pycolmap.__version__}, expected 4.2 or later: '
                        'pip install -U -r requirements-tools.txt')
    pycolmap.logging.minloglevel = 3
    return pycolmap


def plan_matching(count, is_video):
    """How photos are matched, and approximately how many pairs there are.

    Returns:
      'exhaustive', 'sequential' or 'vocabulary tree', and the number of pairs.
    """
    if is_video:
        steps = {*range(1, SEQUENCE_OVERLAP + 1), *(2 ** k for k in range(SEQUENCE_OVERLAP))}
        loops = combinations(keyframes(range(count)), 2)
        return 'sequential', (sum(max(0, count - step) for step in steps)
                              + sum(b - a not in steps for a, b in loops))
    if count <= MAX_EXHAUSTIVE:
        return 'exhaustive', count * (count - 1) // 2
    return 'vocabulary tree', count * SIMILAR_PHOTOS


def keyframes(frames):
    """At most MAX_KEYFRAMES of a sequence, evenly spread."""
    return frames[::-(-len(frames) // MAX_KEYFRAMES)]


class PoseEstimation:
    """Features, matches and cameras of prepared photos.

    Args:
      prepared: the `Prepared` photos.
      groups: list of `CameraGroup`.
      num_threads, seed: as the options.
    """

    def __init__(self, prepared, groups, num_threads, seed):
        self.pycolmap = import_pycolmap()
        self.folder, self.database = prepared.folder, prepared.database
        self.vocabulary_file = prepared.vocabulary
        self.images, self.masks, self.groups = prepared.images, prepared.masks, groups
        self.names = sorted(photo.name for group in groups for photo in group.photos)
        self.num_threads, self.seed = num_threads, seed
        self.pycolmap.set_random_seed(seed)

    def run(self, is_video):
        """All steps; returns `Poses`, without a model if no photos could be placed.

        Raises:
          UserError: COLMAP failed, or its database cannot be used. Stopped: a signal has arrived.
        """
        names = set(self.names)
        if forget_photos(self.database, lambda name: name not in names):
            self.vocabulary_file.unlink(missing_ok=True)
        try:
            self.reader = self.pycolmap.Database.open(self.database)
        except RuntimeError:
            raise UserError(f'{self.database}: not a database of COLMAP; delete it') from None
        with closing(self.reader):
            return self.run_steps(is_video)

    def run_steps(self, is_video):
        """`run` with the database open."""
        self.extract()
        self.match(is_video)
        poses = self.statistics()
        models = []
        attempts = [partial(self.map_incrementally, angle) for angle in INITIAL_ANGLES] + [self.map_globally]
        for work in attempts:
            best = largest(models)
            if best is None or best.num_reg_images() < ENOUGH_PLACED * len(self.names):
                models += work()
        best = largest(models)
        if best is None:
            return poses
        refined = self.step('refinement', refine, best, self.num_threads)
        poses.few_points = remove_uncertain(refined)
        if refined.num_reg_images() >= MIN_PHOTOS:
            poses.model = refined
        placed = {image.name for image in placed_images(best)}
        for model in sorted(models, key=lambda model: model.num_reg_images()):
            names = {image.name for image in placed_images(model)}
            if not names & placed:
                poses.separate.update(dict.fromkeys(names, len(names)))
        return poses

    # --- steps ----------------------------------------------------------------------------------------------

    def extract(self):
        """Find SIFT features (Lowe 2004), one camera for each group."""
        def work(token):
            for group in self.groups:
                names = [photo.name for photo in group.photos]
                reader = {'camera_model': 'SIMPLE_RADIAL'}
                if self.masks.is_dir():
                    reader['mask_path'] = str(self.masks)
                camera_id = self.known_camera(names)
                if camera_id is not None:
                    reader['existing_camera_id'] = camera_id
                elif group.focal:
                    reader['camera_params'] = f'{group.focal},{group.width / 2},{group.height / 2},0'
                self.pycolmap.extract_features(
                    self.database, self.images, image_names=names, reader_options=reader,
                    camera_mode=self.pycolmap.CameraMode.SINGLE, cancellation_token=token,
                    extraction_options={'num_threads': self.num_threads, 'max_image_size': FEATURE_IMAGE_SIZE,
                                        'sift': {'max_num_features': MAX_FEATURES}})
        self.step('features', work, total=len(self.names), count=self.count_features)

    def match(self, is_video):
        """Match features between photos, and verify that the matches fit a camera motion."""
        method, pairs = plan_matching(len(self.names), is_video)
        options = {'matching_options': {'num_threads': self.num_threads},
                   'verification_options': {'ransac': {'random_seed': self.seed}}}

        def work(token):
            if method == 'exhaustive':
                self.pycolmap.match_exhaustive(self.database, cancellation_token=token, **options)
            if method == 'vocabulary tree':
                pairing = {'vocab_tree_path': str(self.vocabulary()), 'num_images': SIMILAR_PHOTOS,
                           'num_threads': self.num_threads}
                self.pycolmap.match_vocabtree(self.database, pairing_options=pairing,
                                              cancellation_token=token, **options)
            if method != 'exhaustive':  # neighbours in the order of their names
                self.pycolmap.match_sequential(self.database, pairing_options={'overlap': SEQUENCE_OVERLAP},
                                               cancellation_token=token, **options)
            if method == 'sequential':  # where the video comes back to an earlier place
                pairs = self.folder / 'pairs.txt'
                write_text(pairs, ''.join(f'{a} {b}\n' for a, b in combinations(keyframes(self.names), 2)))
                self.pycolmap.match_image_pairs(self.database, pairing_options={'match_list_path': pairs},
                                                cancellation_token=token, **options)
        self.step(f'matches ({method})', work, total=pairs, count=self.count_pairs)

    def vocabulary(self):
        """The file of a vocabulary tree, built from the features of the photos themselves."""
        path = self.vocabulary_file
        if path.is_file():
            return path
        random = np.random.default_rng(self.seed)
        images = self.reader.read_all_images()
        share = VOCABULARY_FEATURES // len(images)
        descriptors = [self.reader.read_descriptors(image.image_id) for image in images]
        chosen = [random.permutation(part.data)[:share] for part in descriptors]
        sample = self.pycolmap.FeatureDescriptors(type=descriptors[0].type, data=np.concatenate(chosen))
        index = self.pycolmap.VisualIndex.create(128, 64)
        words = max(1, min(VOCABULARY_WORDS, len(sample.data) // FEATURES_PER_WORD))
        index.build({'num_visual_words': words, 'num_iterations': 10, 'num_rounds': 1,
                     'num_threads': self.num_threads}, sample.to_float())
        with atomic_write(path) as partial:
            index.write(partial)
        return path

    def map_incrementally(self, initial_angle):
        """Place one photo after the other, beginning with two whose rays meet at `initial_angle` degrees;
        returns the reconstructions."""
        placed = []

        def work(token):
            return self.pycolmap.incremental_mapping(
                self.database, self.images, output, cancellation_token=token,
                initial_image_pair_callback=lambda: placed.extend([0, 0]),
                next_image_callback=lambda: placed.append(0),
                options={'random_seed': self.seed, 'num_threads': self.num_threads,
                         'min_model_size': MIN_PHOTOS, 'image_names': self.names,
                         'mapper': {'init_min_tri_angle': initial_angle}})
        with self.output_folder() as output:
            models = self.step('cameras', work, total=len(self.names), count=lambda: len(placed))
        return list(models.values())

    def map_globally(self):
        """Place all photos at once (Pan et al. 2024); returns the reconstructions."""
        def work(_):  # it cannot be stopped
            return self.pycolmap.global_mapping(
                self.database, self.images, output,
                options={'random_seed': self.seed, 'num_threads': self.num_threads,
                         'min_model_size': MIN_PHOTOS, 'image_names': self.names})
        with self.output_folder() as output:
            try:
                models = self.step('cameras, all at once', work)
            except UserError as error:  # it gives up on pairs that do not connect
                tqdm.write(f'photos.py: warning: {error}', file=sys.stderr)
                return []
        return list(models.values())

    def output_folder(self):
        """A temporary folder, which the next run removes if this one is killed."""
        return tempfile.TemporaryDirectory(dir=self.folder, prefix=f'.models{PARTIAL}{os.getpid()}-')

    def step(self, name, work, *args, total=None, count=None):
        """Run `work(*args, token)` on a thread of its own, below a progress bar; returns its result.

        The thread is told to stop by the `CancellationToken`, and waited for, if a signal arrives.

        Raises:
          UserError: COLMAP failed. Stopped: a signal has arrived.
        """
        token = self.pycolmap.CancellationToken()
        layout = None if total else '{desc}: {elapsed}'
        bar = tqdm(desc=name, total=total, disable=None, bar_format=layout)
        with ThreadPoolExecutor(1) as pool, bar:
            future = pool.submit(work, *args, token)
            try:
                while True:
                    with suppress(TimeoutError):
                        result = future.result(POLL_SECONDS)
                        break
                    if count:
                        bar.n = min(count(), total)
                    bar.refresh()
            except BaseException as error:
                token.cancel()
                if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, UserError):
                    raise UserError(f'{self.folder}: COLMAP failed ({name}): {first_line(error)}') from error
                raise
            bar.n = total or 0
        return result

    # --- the database ---------------------------------------------------------------------------------------

    def count_features(self):
        """The number of photos whose features are in the database."""
        return sum(self.reader.exists_keypoints(image.image_id) for image in self.reader.read_all_images())

    def count_pairs(self):
        """The number of pairs in the database that have matches."""
        return self.reader.num_matched_image_pairs()

    def known_camera(self, names):
        """The camera that an earlier run has given one of these photos; None if it has not."""
        cameras = {image.name: image.camera_id for image in self.reader.read_all_images()}
        return next((cameras[name] for name in names if name in cameras), None)

    def statistics(self):
        """`Poses` with the numbers of features and matches."""
        poses = Poses()
        names = {image.image_id: image.name for image in self.reader.read_all_images()}
        poses.features = {name: self.reader.num_keypoints_for_image(key) for key, name in names.items()}
        for pair, inliers in zip(*self.reader.read_two_view_geometry_num_inliers()):
            for key in self.pycolmap.pair_id_to_image_pair(pair):
                name = names[key]
                poses.matches[name] = poses.matches.get(name, 0) + inliers
                poses.best_match[name] = max(poses.best_match.get(name, 0), inliers)
        return poses


def largest(models):
    """The reconstruction with the most photos; None without any."""
    return max(models, key=lambda model: model.num_reg_images(), default=None)


def placed_images(model):
    """The images of a reconstruction that have a pose, sorted by name."""
    return sorted((model.image(key) for key in model.reg_image_ids()), key=lambda image: image.name)


# --- refinement ---------------------------------------------------------------------------------------------

def refine(model, num_threads, token):
    """Refine poses, points and cameras of a reconstruction together; returns the refined one. Stops early,
    with a result that must not be used, if the `CancellationToken` says so.

    A camera model with more parameters is taken only if it fits clearly better: parameters that the photos do
    not determine, such as the distortion near borders that no feature is close to, harm poses.
    """
    best, best_cost = None, np.inf
    for name, refine_principal_point in CAMERA_MODELS:
        if token.is_cancelled:
            break
        refined, cost = refine_as(name, model, refine_principal_point, num_threads)
        plausible = all(is_plausible(refined.camera(key)) for key in refined_cameras(refined))
        if best is None or (cost < MIN_GAIN * best_cost and plausible):
            best, best_cost = refined, cost
    return best


def remove_uncertain(model):
    """Remove photos with too few points from a reconstruction, in place; returns their numbers of points by
    name. Points that only one photo is left to see go with it, so others may follow."""
    removed = {}
    while few := [image for image in placed_images(model) if image.num_points3D < MIN_POINTS]:
        removed.update({image.name: image.num_points3D for image in few})
        for image in few:
            model.deregister_frame(image.frame_id)
    return removed


def refined_cameras(model):
    """The cameras of a reconstruction whose photos suffice to refine their intrinsics, as a set of ids."""
    photos = Counter(image.camera_id for image in placed_images(model))
    return {key for key, count in photos.items() if count >= MIN_PHOTOS_TO_REFINE}


def refine_as(name, model, refine_principal_point, num_threads):
    """Refine a copy of a reconstruction with cameras of the model `name`; those with few photos keep theirs.
    Unless the principal point is refined, it is the centre.

    Returns:
      the copy, and the mean error of all former observations in pixels; dropped ones count with the largest.
    """
    import pycolmap
    refined = pycolmap.Reconstruction(model)
    for key in refined_cameras(refined):
        camera = refined.camera(key)
        fx, fy, cx, cy, k1, k2, *_ = opencv_params(camera)
        if not refine_principal_point:
            cx, cy = camera.width / 2, camera.height / 2
        camera.model = vars(pycolmap.CameraModelId)[name]
        camera.params = {'SIMPLE_PINHOLE': [fx, cx, cy], 'SIMPLE_RADIAL': [fx, cx, cy, k1],
                         'RADIAL': [fx, cx, cy, k1, k2], 'OPENCV': [fx, fy, cx, cy, k1, k2, 0, 0]}[name]
    size = max(max(camera.width, camera.height) for camera in refined.cameras.values())
    limits = np.array(MAX_ERRORS) * min(1.0, size / ERRORS_SIZE)
    for limit in limits:
        adjust(refined, num_threads, refine_principal_point)
        pycolmap.ObservationManager(refined).filter_all_points3D(limit, MIN_ANGLE)
    adjust(refined, num_threads, refine_principal_point)
    before, after = model.compute_num_observations(), refined.compute_num_observations()
    error = refined.compute_mean_reprojection_error()
    return refined, (error * after + limits[-1] * (before - after)) / before


def adjust(model, num_threads, refine_principal_point=True):
    """Bundle adjustment of a reconstruction, in place; cameras with few photos keep their intrinsics."""
    import pycolmap
    config = pycolmap.BundleAdjustmentConfig()
    for image in placed_images(model):
        config.add_image(image.image_id)
    for camera_id in {image.camera_id for image in placed_images(model)} - refined_cameras(model):
        config.set_constant_cam_intrinsics(camera_id)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    options = pycolmap.BundleAdjustmentOptions()
    options.refine_principal_point, options.print_summary = refine_principal_point, False
    options.ceres.solver_options.num_threads = num_threads
    pycolmap.create_default_bundle_adjuster(options, config, model).solve()
    model.update_point_3d_errors()


def is_plausible(camera):
    """Whether a refined camera is like those that exist: square pixels, a principal point near the centre,
    moderate distortion."""
    width, height = camera.width, camera.height
    distortion = opencv_params(camera)[4:]
    return (abs(camera.principal_point_x / width - 0.5) < MAX_OFF_CENTER
            and abs(camera.principal_point_y / height - 0.5) < MAX_OFF_CENTER
            and abs(camera.focal_length_x / camera.focal_length_y - 1) < MAX_STRETCH
            and MIN_FOCAL < camera.mean_focal_length() / max(width, height) < MAX_FOCAL
            and np.abs(distortion).max() < MAX_DISTORTION)


def opencv_params(camera):
    """fx, fy, cx, cy, k1, k2, p1, p2 of a camera whose model is OPENCV, RADIAL, SIMPLE_RADIAL or
    SIMPLE_PINHOLE."""
    if camera.model_name == 'OPENCV':
        return np.array(camera.params)
    f, cx, cy, *k = camera.params
    return np.array([f, f, cx, cy, *k, *[0.0] * (4 - len(k))])
