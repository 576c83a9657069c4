"""What a person should know about a capture: why photos were dropped, what is wrong, and what helps."""
import base64
import io
from pathlib import Path

import numpy as np

from tools.capture.poses import ENOUGH_PLACED
from tools.capture.quality import EXPOSURE_SPREAD, SOFT_FRACTION

# A photo with fewer features than this shows too little texture.
FEW_FEATURES = 300
# A photo whose best match with another has fewer correspondences than this cannot be placed reliably.
FEW_MATCHES = 30
# A mean reprojection error of more than this many pixels is large.
LARGE_ERROR = 1.5
# Scenes with fewer photos than this have gaps.
FEW_PHOTOS = 15
# At most this number of points is in a report.
REPORT_POINTS = 4000
# Thumbnails have this length of their longer side in pixels.
THUMBNAIL_SIDE = 160


def explain_unplaced(photos, poses):
    """Give photos that have no pose, and no reason yet, the likely reason."""
    placed = {view.name for view in poses.views}
    for photo in photos:
        if photo.reason is None and photo.name not in placed:
            photo.reason = unplaced_reason(photo, poses)


def unplaced_reason(photo, poses):
    features, best = photo.features or 0, poses.best_match.get(photo.name, 0)
    if features < FEW_FEATURES:
        return f'few features ({features}): it shows little texture, or is blurred'
    if best < FEW_MATCHES:
        return (f'few matches ({best} with the most similar photo): another place, or too far from the other '
                'photos')
    if photo.name in poses.separate:
        return (f'it belongs to a separate group of {poses.separate[photo.name]} photos, which nothing '
                'connects with the others')
    return 'its matches do not fit one camera position: repeated patterns, reflections or moving things'


def findings_of(photos, views, error):
    """Findings for the report, the worst first.

    Args:
      photos: all `Photo`s.
      views: list of `View` of those with a pose; empty if pose estimation failed.
      error: mean reprojection error in pixels.
    """
    found, usable = [], [photo for photo in photos if photo.reason is None and photo.sharpness is not None]

    def add(level, text, advice=None):
        found.append({'level': level, 'text': text, 'advice': advice})
    share = len(views) / max(1, len(photos))
    if not views:
        add('error', 'No cameras were found: too few photos show the same things.', advice_for(photos))
    elif share < ENOUGH_PLACED:
        add('warning', f'Only {len(views)} of {len(photos)} photos have a camera.', advice_for(photos))
    else:
        add('good', f'{len(views)} of {len(photos)} photos have a camera.')
    if views and error > LARGE_ERROR:
        add('warning', f'The mean reprojection error is large: {error:.2f} pixels.',
            'Keep the scene still, and fix focus and zoom.')
    elif views:
        add('good', f'The mean reprojection error is {error:.2f} pixels.')
    if 0 < len(views) < FEW_PHOTOS:
        add('warning', f'There are only {len(views)} views.', 'Take 20 to 60 photos.')
    median = np.median([photo.sharpness for photo in usable]) if usable else 0
    soft = [photo.name for photo in usable if photo.sharpness < SOFT_FRACTION * median]
    if soft:
        add('warning', f'{len(soft)} photos are much less sharp than the others: {listed(soft)}.',
            'Hold the camera still for each photo, or take care for more light.')
    exposures = [photo.exposure for photo in usable]
    if exposures and np.ptp(np.percentile(exposures, [5, 95])) > EXPOSURE_SPREAD:
        add('warning', 'Some photos are much brighter than others.', 'Lock the exposure and white balance.')
    order = ('error', 'warning', 'good')
    return sorted(found, key=lambda finding: order.index(finding['level']))


def advice_for(photos):
    """One line of advice that fits why photos have no camera."""
    reasons = [photo.reason or '' for photo in photos]
    features = [photo.features for photo in photos if photo.features is not None]
    if sum(reason.startswith('blurred') for reason in reasons) > len(photos) / 4:
        return 'Less blur: hold the camera still, with more light.'
    if features and np.median(features) < FEW_FEATURES:
        return 'More texture: include surroundings with texture, such as newspapers below a plain object.'
    if len(features) < 3:
        return 'More photos: 20 to 60 that can be used.'
    return 'More overlap: move a small step between photos, so that each shows most of what the last one did.'


def listed(names, most=5):
    """Names in a line, not too many."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def make_report(title, photos, ignored, groups, arrays=None, placement=None, images=None, findings=()):
    """The report as a dict for `scenes.report.write_report`.

    Args:
      title: of the report.
      photos: all `Photo`s.
      ignored: paths of files that are no photos.
      groups: list of `CameraGroup`.
      arrays, placement: `Arrays` and `Placement` of the cameras; None if there are none.
      images: the folder of prepared photos, for thumbnails.
      findings: as from `findings_of`.
    """
    summary = [f'{len(photos)} photos, {len(groups)} camera{"s" * (len(groups) != 1)}: '
               + listed([f'{len(group.photos)} × {group.width}×{group.height}' for group in groups])]
    if ignored:
        summary.append(f'Ignored, because it is no photo: {listed([path.name for path in ignored])}')
    scene = {'type': None, 'near': 0.0, 'far': 0.0, 'aabb': None, 'up': [0.0, 0.0, 1.0]}
    cameras, points = [], np.empty((0, 3))
    if placement is not None:
        summary.append(f'Scene: {placement.scene_type}; near {placement.near:.3g}, far {placement.far:.3g}; '
                       f'{len(arrays.points)} points')
        scene.update(type=placement.scene_type, near=placement.near, far=placement.far,
                     aabb=placement.aabb.tolist())
        cameras = [camera_entry(view, pose, index)
                   for index, (view, pose) in enumerate(zip(arrays.views, placement.poses))]
        points = placement.points[::max(1, -(-len(placement.points) // REPORT_POINTS))]
    entries = [photo_entry(photo, images) for photo in photos]
    return {'title': title, 'summary': summary, 'findings': list(findings), 'scene': scene,
            'cameras': cameras, 'points': points.tolist(), 'photos': entries}


def camera_entry(view, pose, index):
    """A camera of the report; every 8th view is a test view, as `llffhold` has it."""
    return {'name': view.name, 'position': pose[:, 3].tolist(), 'forward': (-pose[:, 2]).tolist(),
            'up': pose[:, 1].tolist(), 'split': 'test' if index % 8 == 0 else 'train', 'fov': view.fov()}


def photo_entry(photo, images):
    """A photo of the report; those that are not used have a thumbnail."""
    used = photo.reason is None
    return {'name': photo.name if used else photo.source.name, 'used': used, 'reason': photo.reason,
            'sharpness': photo.sharpness, 'exposure': photo.exposure, 'features': photo.features,
            'matches': photo.matches, 'error': photo.error,
            'thumbnail': None if used or images is None else thumbnail(images / photo.name)}


def thumbnail(path):
    """A small photo as a data URL; None if it cannot be read."""
    from PIL import Image
    if not Path(path).is_file():
        return None
    with Image.open(path) as image:
        image = image.convert('RGB')
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        content = io.BytesIO()
        image.save(content, 'JPEG', quality=75)
    return 'data:image/jpeg;base64,' + base64.b64encode(content.getvalue()).decode()
