"""What a person should know about a capture: why photos were dropped, what is wrong, and what helps."""
import base64
import io
from collections import Counter
from pathlib import Path

import numpy as np

from scenes.report import MIN_FRACTION
from tools.capture.collect import Reason, readable
from tools.capture.poses import ENOUGH_PLACED
from tools.capture.quality import EXPOSURE_SPREAD
from tools.capture.write import LLFFHOLD

# A photo with fewer features than this shows too little texture. Those of fox have 2,945 or more, of fern
# 6,697 or more.
FEW_FEATURES = 300
# A photo whose best match with another has fewer correspondences than this cannot be placed reliably; COLMAP
# itself needs 15 for a pair and 30 for a photo.
FEW_MATCHES = 30
# A mean reprojection error of more than this many pixels is large; it is 0.55 for fox and 0.62 for fern.
LARGE_ERROR = 1.5
# Scenes with fewer photos than this have gaps.
FEW_PHOTOS = 15
# At most this number of points is in a report.
REPORT_POINTS = 4000
# Thumbnails have this length of their longer side in pixels.
THUMBNAIL_SIDE = 160
# What helps against each kind of `Reason`.
ADVICE = {
    'unreadable': 'Replace the files that cannot be read.',
    'heif': 'To read HEIC photos: pip install pillow-heif',
    'dark': 'More light, or a longer exposure.',
    'bright': 'Less light, or a shorter exposure.',
    'blank': 'Remove photos that show nothing.',
    'duplicate': 'More photos, each from another place.',
    'blurred': 'Less blur: hold the camera still, with more light.',
    'texture': 'More texture: include surroundings with detail, such as newspapers below a plain object.',
    'overlap': 'More overlap: move a small step between photos, so that neighbours show mostly the same.',
    'inconsistent': 'Keep the scene still, and include surroundings that do not repeat or reflect.',
    'few': 'More photos: 20 to 60 that can be used.',
}
# Photos that are dropped for these kinds of reasons do not count as usable.
UNUSABLE = ('unreadable', 'heif', 'dark', 'bright', 'blank', 'duplicate', 'blurred')


def explain_unplaced(photos, poses, placed):
    """Give photos that have no pose, and no reason yet, the likely reason.

    Args:
      photos: list of `Photo`.
      poses: `Poses`.
      placed: the names of photos with a pose.
    """
    for photo in photos:
        if photo.reason is None and photo.name not in placed:
            photo.reason = unplaced_reason(photo, poses)


def unplaced_reason(photo, poses):
    """The likely `Reason` why a photo has no pose."""
    features, best = photo.features or 0, poses.best_match.get(photo.name, 0)
    if features < FEW_FEATURES:
        return Reason('texture', f'few features ({features}): it shows little texture, or is blurred')
    if best < FEW_MATCHES:
        return Reason('overlap', f'few matches ({best} with the most similar photo): another place, or too '
                      'far from the other photos')
    if (size := poses.separate.get(photo.name)) is not None:
        return Reason('overlap', f'it belongs to a separate group of {size} photos, which nothing connects '
                      'with the others')
    if (points := poses.few_points.get(photo.name)) is not None:
        return Reason('inconsistent', f'too few points ({points}) agree with its camera')
    return Reason('inconsistent', 'its matches do not fit one camera position: repeated patterns, '
                  'reflections or moving objects')


def findings_of(photos, views, error):
    """Findings for the report.

    Args:
      photos: all `Photo`s.
      views: list of `View` of those with a pose; empty if pose estimation failed.
      error: mean reprojection error in pixels.
    Returns:
      list of dicts with level, text and advice, as `scenes.report` has them; the most serious first.
    """
    found = []

    def add(level, text, advice=None):
        found.append({'level': level, 'text': text, 'advice': advice})
    usable = [photo for photo in photos if photo.reason is None or photo.reason.kind not in UNUSABLE]
    if not views:
        add('error', f'No cameras were found. {len(usable)} of {len(photos)} photos can be used.',
            advice_for(photos))
    elif len(views) < ENOUGH_PLACED * len(usable):
        add('warning', f'Only {len(views)} of {len(usable)} usable photos have a camera.', advice_for(usable))
    else:
        add('good', f'{len(views)} of {len(usable)} usable photos have a camera.')
    if len(usable) < ENOUGH_PLACED * len(photos):
        add('warning', f'{len(photos) - len(usable)} of {len(photos)} photos cannot be used.',
            advice_for([photo for photo in photos if photo.reason and photo.reason.kind in UNUSABLE]))
    if views and error > LARGE_ERROR:
        add('warning', f'The mean reprojection error is large: {error:.2f} pixels.',
            'Keep the scene still, and fix focus and zoom.')
    elif views:
        add('good', f'The mean reprojection error is {error:.2f} pixels.')
    if 0 < len(views) < FEW_PHOTOS:
        add('warning', f'There are only {len(views)} views.', 'Take 20 to 60 photos.')
    measured = [photo for photo in usable if photo.sharpness is not None]
    median = np.median([photo.sharpness for photo in measured]) if measured else 0
    soft = [photo.shown for photo in measured if photo.sharpness < MIN_FRACTION * median]
    if soft:
        add('warning', f'Much less sharp than the other photos: {listed(soft)}.',
            'Hold the camera still for each photo, or use more light.')
    exposures = [photo.exposure for photo in measured]
    if exposures and np.ptp(np.percentile(exposures, [5, 95])) > EXPOSURE_SPREAD:
        add('warning', 'Some photos are much brighter than others.', 'Lock the exposure and white balance.')
    order = ('error', 'warning', 'good')
    return sorted(found, key=lambda finding: order.index(finding['level']))


def advice_for(photos):
    """The `ADVICE` against the most frequent reason why photos are not used."""
    kinds = Counter(photo.reason.kind for photo in photos if photo.reason)
    return ADVICE[max(kinds, key=kinds.get, default='few')]


def listed(names, most=5):
    """Names in a line, at most `most` of them."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def make_report(title, photos, ignored, groups, findings, images=None, arrays=None, placement=None,
                ndc=False):
    """The report as a dict for `scenes.report.write_report`; lengths are in units of the placed scene.

    Args:
      title: of the report.
      photos: all `Photo`s.
      ignored: paths of other files.
      groups: list of `CameraGroup`.
      findings: as from `findings_of`.
      images: the folder of prepared photos, for thumbnails; None for none.
      arrays, placement: `Arrays` and `Placement` of the cameras; None if there are none.
      ndc: whether the scene is trained in normalised device coordinates.
    """
    summary = [f'{len(photos)} photos, {len(groups)} camera{"s" * (len(groups) != 1)}: '
               + listed([f'{len(group.photos)} × {group.width}×{group.height}' for group in groups])]
    if ignored:
        summary.append(f'Not photos, ignored: {listed([readable(Path(path.name)) for path in ignored])}')
    scene = {'type': None, 'near': 0.0, 'far': 0.0, 'aabb': None, 'up': [0.0, 0.0, 1.0], 'ndc': ndc}
    cameras, points = [], np.empty((0, 3))
    if placement is not None:
        summary.append(f'Scene: {placement.scene_type}; near {placement.near:.3g}, far {placement.far:.3g}; '
                       f'{len(arrays.points)} points')
        scene.update(type=placement.scene_type, near=placement.near, far=placement.far,
                     aabb=None if ndc else placement.aabb.tolist())
        shown = {photo.name: photo.shown for photo in photos}
        cameras = [camera_entry(shown[view.name], view, pose, index)
                   for index, (view, pose) in enumerate(zip(arrays.views, placement.poses))]
        points = placement.points[::max(1, -(-len(placement.points) // REPORT_POINTS))]
    entries = [photo_entry(photo, images) for photo in photos]
    return {'title': title, 'summary': summary, 'findings': list(findings), 'scene': scene,
            'cameras': cameras, 'points': points.tolist(), 'photos': entries}


def camera_entry(name, view, pose, index):
    """A camera of the report; every `LLFFHOLD`th view is a test view."""
    return {'name': name, 'position': pose[:, 3].tolist(), 'forward': (-pose[:, 2]).tolist(),
            'up': pose[:, 1].tolist(), 'split': 'train' if index % LLFFHOLD else 'test', 'fov': view.fov()}


def photo_entry(photo, images):
    """A photo of the report; those that are not used have a thumbnail."""
    used = photo.reason is None
    return {'name': photo.shown, 'used': used, 'reason': None if used else photo.reason.text,
            'sharpness': photo.sharpness, 'exposure': photo.exposure, 'features': photo.features,
            'matches': photo.matches, 'error': photo.error,
            'thumbnail': None if used or images is None else thumbnail(images / photo.name)}


def thumbnail(path):
    """A small photo as a data URL; None if there is no file."""
    from PIL import Image
    if not path.is_file():
        return None
    with Image.open(path) as image:
        image = image.convert('RGB')
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        content = io.BytesIO()
        image.save(content, 'JPEG', quality=75)
    return 'data:image/jpeg;base64,' + base64.b64encode(content.getvalue()).decode()
