"""Photos in a folder: which files they are, what their headers say, and which of them share a camera.

Only headers are read here, so that thousands of large photos need little time and memory.
"""
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scenes.errors import UserError, first_line
from scenes.images import ORIENTATION, TURNED, is_turned

# Files with these extensions, in lower or upper case, are photos.
PHOTO_EXTENSIONS = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.tif', '.tiff', '.bmp', '.heic',
                    '.heif', '.avif')
# Files with these extensions need the package pillow-heif.
HEIF_EXTENSIONS = ('.heic', '.heif')
# Files with these extensions are videos.
VIDEO_EXTENSIONS = ('.mp4', '.mov', '.m4v', '.avi', '.mkv', '.webm')
# Files with these extensions hold the raw data of a camera's sensor.
RAW_EXTENSIONS = ('.dng', '.cr2', '.cr3', '.nef', '.arw', '.raf', '.orf', '.rw2')
# The diagonal of a frame of 36 mm × 24 mm, to which 35 mm equivalent focal lengths refer.
FULL_FRAME_DIAGONAL = math.hypot(36, 24)
# Millimetres in each FocalPlaneResolutionUnit of EXIF: none, inch, centimetre, millimetre, micrometre.
RESOLUTION_UNITS = {1: 25.4, 2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}


class Exif:
    """The numbers of EXIF tags."""
    MAKE, MODEL, DETAILS = 0x010F, 0x0110, 0x8769
    FOCAL_LENGTH, FOCAL_LENGTH_35MM, DIGITAL_ZOOM, LENS = 0x920A, 0xA405, 0xA404, 0xA434
    PLANE_RESOLUTION, PLANE_UNIT, ORIGINAL_WIDTH = 0xA20E, 0xA210, 0xA002


class Reason(NamedTuple):
    """Why a photo is not used."""
    kind: str    # a key of `tools.capture.diagnose.ADVICE`
    text: str


@dataclass
class Photo:
    """A photo or a frame of a video, and what is found out about it."""
    source: Path                     # the file it comes from
    shown: str                       # the name shown to the user: path in the input, or the frame's name
    name: str                        # its file name in images/
    width: int = 0                   # of the upright photo in pixels
    height: int = 0
    camera: tuple = ()               # make, model, lens, focal lengths and zoom as in EXIF
    focal: float | None = None       # focal length in pixels according to EXIF
    as_is: bool = False              # whether the file is an upright JPEG, which can be copied
    mask: Path | None = None         # its mask, in the photo's orientation; white is used
    reason: Reason | None = None     # why it is not used
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

    Hidden files and folders, folders called `masks`, and files without the extension of a photo are ignored.
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
        raws = [path for path in ignored if path.suffix.lower() in RAW_EXTENSIONS]
        advice = 'expected photos, such as .jpg'
        if videos:
            advice = f'for a video, give its path: {videos[0]}'
        elif raws:
            advice = f'export raw files as JPEG, such as {raws[0].name}'
        raise UserError(f'{folder}: found no photo among {len(ignored)} other files; {advice}')
    register_heif()
    taken = set()
    photos = [read_header(path, readable(path.relative_to(folder)),
                          unique_name(path.relative_to(folder), taken)) for path in paths]
    for photo in photos:
        photo.mask = find_mask(photo.source, Path(folder))
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


def find_mask(photo, folder):
    """The mask of a photo below the input `folder`; None if there is none.

    It has the photo's name with another extension, or with an extension appended, and lies in `masks/` in a
    folder that holds the photo, or beside the input folder or one called `images`, in the same subfolder.
    """
    photo, folder = photo.absolute(), folder.absolute()
    places = []
    for parent in photo.parents[:len(photo.relative_to(folder).parts)]:
        places.append(Path(parent, 'masks', photo.relative_to(parent)))
        if parent.name == 'images' or parent == folder:
            places.append(Path(parent.parent, 'masks', photo.relative_to(parent)))
    extensions = [*PHOTO_EXTENSIONS, *map(str.upper, PHOTO_EXTENSIONS)]
    files = [file for place in places for extension in extensions
             for file in (place.with_suffix(extension), Path(f'{place}{extension}'))]
    return next((file for file in files if file.is_file()), None)


def readable(path):
    """A path as text that can be printed, whatever bytes it has."""
    return path.as_posix().encode(errors='surrogateescape').decode(errors='replace')


def unique_name(path, taken):
    """A file name without extension for the photo at `path` within its folder: subfolders become part of it.
    It differs from the names `taken` by more than upper case, and is added to them. It has no dot, so that
    names sort the same with every extension."""
    stem = re.sub(r'[^\w-]', '_', '_'.join(path.with_suffix('').parts))
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


def read_header(path, shown, stem):
    """A `Photo` with what the header of its file says; with a reason if it cannot be opened."""
    from PIL import Image, UnidentifiedImageError
    photo = Photo(path, shown, f'{stem}.jpg')
    try:
        with Image.open(path) as image:
            photo.as_is = (image.format == 'JPEG' and image.mode in ('RGB', 'L')
                           and image.getexif().get(ORIENTATION, 1) == 1)
            if has_alpha(image):
                photo.name = f'{stem}.png'
            read_exif(photo, image)
    except Exception as error:  # each codec raises its own types of error for a damaged file
        photo.reason = Reason('unreadable', f'not a readable photo ({first_line(error)})')
        if path.suffix.lower() in HEIF_EXTENSIONS:
            photo.reason = Reason('heif', 'HEIC cannot be read: pip install pillow-heif')
        elif isinstance(error, UnidentifiedImageError):
            photo.reason = Reason('unreadable',
                                  'not a readable photo (its content does not match its extension)')
    return photo


def has_alpha(image):
    """Whether a Pillow image has transparency."""
    return 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa')


def read_exif(photo, image):
    """Fill in the size of a photo upright, and what the EXIF of its Pillow image says about its camera.

    The focal length in pixels follows from the 35 mm equivalent, which refers to the diagonal, or from the
    focal length in mm and the resolution of the sensor along the stored width (CIPA DC-008, 4.6.6).
    """
    exif = image.getexif()
    details = exif.get_ifd(Exif.DETAILS)
    photo.width, photo.height = image.size[::-1] if is_turned(image) else image.size
    stored_width = photo.height if exif.get(ORIENTATION) in TURNED else photo.width
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
    intrinsics, the one with the most photos first."""
    groups = {}
    for photo in photos:
        key = (*photo.camera, photo.width, photo.height)
        groups.setdefault(key, CameraGroup([], photo.width, photo.height, photo.focal)).photos.append(photo)
    return sorted(groups.values(), key=lambda group: -len(group.photos))
