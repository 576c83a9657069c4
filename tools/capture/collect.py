"""Photos in a folder: which files they are, what their headers say, and which of them share a camera.

Only headers are read here, so that thousands of large photos need little time and memory.
"""
import glob
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from scenes.errors import UserError, first_line

# Files with these extensions, in lower or upper case, are photos.
PHOTO_EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.tif', '.tiff', '.bmp', '.heic',
                    '.heif', '.avif')
# Files with these extensions need the package pillow-heif.
HEIF_EXTENSIONS = ('.heic', '.heif')
# Files with these extensions are videos.
VIDEO_EXTENSIONS = ('.mp4', '.mov', '.m4v', '.avi', '.mkv', '.webm')
# These orientations in EXIF exchange width and height.
TURNED_BY_90 = (5, 6, 7, 8)
# The diagonal of a frame of 36 mm × 24 mm, to which 35 mm equivalent focal lengths refer.
FULL_FRAME_DIAGONAL = math.hypot(36, 24)
# Millimetres in each FocalPlaneResolutionUnit of EXIF: none, inch, centimetre, millimetre, micrometre.
RESOLUTION_UNITS = {1: 25.4, 2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}


class Exif:
    """Numbers of the tags in a photo's header that describe its camera."""
    ORIENTATION, MAKE, MODEL, DETAILS = 0x0112, 0x010F, 0x0110, 0x8769
    FOCAL_LENGTH, FOCAL_LENGTH_35MM, DIGITAL_ZOOM, LENS = 0x920A, 0xA405, 0xA404, 0xA434
    PLANE_RESOLUTION, PLANE_UNIT, ORIGINAL_WIDTH = 0xA20E, 0xA210, 0xA002


@dataclass
class Photo:
    """A photo or a frame of a video, and what is found out about it. `reason` says why it is not used."""
    source: Path                     # the file it comes from
    name: str                        # its file name in images/, and in the report
    width: int = 0                   # of the upright photo in pixels
    height: int = 0
    camera: tuple = ()               # make, model, lens, focal lengths and zoom as in EXIF
    focal: float | None = None       # focal length in pixels according to EXIF
    as_is: bool = False              # whether the file is an upright JPEG, which can be copied
    mask: Path | None = None         # its mask, as upright as the photo; white counts
    reason: str | None = None
    sharpness: float | None = None   # variance of the Laplacian
    exposure: float | None = None    # mean grey, 0 to 1
    features: int | None = None
    matches: int | None = None       # matches with all other photos that fit a camera motion
    error: float | None = None       # mean reprojection error in pixels

    def resize(self, width, height):
        """Note that the photo was reduced to this size."""
        if self.focal:
            self.focal *= width / self.width
        self.width, self.height = width, height


@dataclass
class CameraGroup:
    """Photos that share their intrinsics."""
    photos: list
    width: int
    height: int
    focal: float | None              # in pixels according to EXIF


def find_photos(folder, skip=None):
    """All photos of a folder and its subfolders, sorted by path.

    Hidden files and folders, folders of masks, and files that are no photos by their extensions are ignored.
    Files with the extension of a photo that cannot be opened are listed with the reason.

    Args:
      folder: path of the folder.
      skip: a folder that is not searched.
    Returns:
      list of `Photo`, and the paths of ignored files.
    Raises:
      UserError: there is no photo.
    """
    paths, ignored = list_files(Path(folder), skip)
    if not paths:
        videos = [path for path in ignored if path.suffix.lower() in VIDEO_EXTENSIONS]
        advice = f'for a video, give its path: {videos[0]}' if videos else 'expected photos, such as .jpg'
        raise UserError(f'{folder}: found no photo among {len(ignored)} other files; {advice}')
    register_heif()
    taken = set()
    photos = [read_header(path, unique_name(path.relative_to(folder), taken)) for path in paths]
    for photo in photos:
        photo.mask = find_mask(photo.source)
    return photos, ignored


def list_files(folder, skip=None):
    """The photos and the other files below a folder, both sorted. Hidden folders are not searched."""
    photos, others = [], []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders
                            if not name.startswith(('.', '__MACOSX')) and name != 'masks'
                            and (skip is None or Path(root, name).resolve() != Path(skip).resolve()))
        for name in sorted(files):
            is_photo = Path(name).suffix.lower() in PHOTO_EXTENSIONS and not name.startswith('.')
            (photos if is_photo else others).append(Path(root, name))
    return photos, others


def find_mask(photo):
    """The mask of a photo: an image of the same name without extension in `masks/` in or beside the photo's
    folder; None if there is none."""
    for folder in (photo.parent / 'masks', photo.parent.parent / 'masks'):
        for path in sorted(folder.glob(f'{glob.escape(photo.stem)}.*')):
            if path.suffix.lower() in PHOTO_EXTENSIONS:
                return path
    return None


def unique_name(path, taken):
    """A file name without extension for the photo at `path` within its folder: subfolders become part of it.
    It differs from the names `taken` by more than upper case, and is added to them."""
    stem = re.sub(r'\s', '_', '_'.join(path.with_suffix('').parts))
    name, count = stem, 1
    while name.lower() in taken:
        count += 1
        name = f'{stem}_{count}'
    taken.add(name.lower())
    return name


def register_heif():
    """Let Pillow read HEIC, the format of iPhones, if the package for it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def read_header(path, stem):
    """A `Photo` with what the header of its file says; with a reason if it cannot be opened."""
    from PIL import Image
    photo = Photo(path, f'{stem}.jpg')
    try:
        with Image.open(path) as image:
            photo.width, photo.height = image.size
            exif = image.getexif()
            photo.as_is = (image.format == 'JPEG' and image.mode in ('RGB', 'L')
                           and exif.get(Exif.ORIENTATION, 1) == 1)
            if has_alpha(image):
                photo.name = f'{stem}.png'
            read_exif(photo, exif)
    except Exception as error:  # each codec raises its own types of error for a damaged file
        photo.reason = f'not a readable photo ({first_line(error)})'
        if path.suffix.lower() in HEIF_EXTENSIONS:
            photo.reason = 'HEIC cannot be read: pip install pillow-heif'
        elif 'cannot identify' in photo.reason:
            photo.reason = 'not a readable photo (the file has another content than its name says)'
    return photo


def has_alpha(image):
    """Whether a Pillow image has transparency."""
    return 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa')


def read_exif(photo, exif):
    """Fill in what EXIF says about a photo's camera, and turn its width and height upright."""
    details = exif.get_ifd(Exif.DETAILS)
    stored_width = photo.width
    if exif.get(Exif.ORIENTATION) in TURNED_BY_90:
        photo.width, photo.height = photo.height, photo.width
    names = [str(value or '').strip('\0 ')
             for value in (exif.get(Exif.MAKE), exif.get(Exif.MODEL), details.get(Exif.LENS))]
    focal, focal_35mm, zoom = (positive(details.get(tag)) for tag in
                               (Exif.FOCAL_LENGTH, Exif.FOCAL_LENGTH_35MM, Exif.DIGITAL_ZOOM))
    photo.camera = (*names, focal, focal_35mm, zoom)
    if focal_35mm:
        photo.focal = focal_35mm / FULL_FRAME_DIAGONAL * math.hypot(photo.width, photo.height)
    elif focal and (resolution := positive(details.get(Exif.PLANE_RESOLUTION))):
        unit = RESOLUTION_UNITS.get(details.get(Exif.PLANE_UNIT), RESOLUTION_UNITS[2])
        original_width = positive(details.get(Exif.ORIGINAL_WIDTH)) or stored_width
        photo.focal = focal * resolution / unit * stored_width / original_width


def positive(value):
    """`value` as a float if it is a positive finite number, otherwise None."""
    try:
        value = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return value if 0 < value < math.inf else None


def group_cameras(photos):
    """Group photos by make, model, lens, focal length, zoom and size: one `CameraGroup` for each set of
    intrinsics, those with most photos first."""
    groups = {}
    for photo in photos:
        key = (*photo.camera, photo.width, photo.height)
        groups.setdefault(key, CameraGroup([], photo.width, photo.height, photo.focal)).photos.append(photo)
    return sorted(groups.values(), key=lambda group: -len(group.photos))
