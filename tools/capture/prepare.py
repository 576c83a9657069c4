"""Photos prepared for pose estimation: upright, no larger than needed, with their EXIF; and their quality.

    colmap/images/         the photos
    colmap/masks/          their masks, if there are any; named as COLMAP wants it, photo.jpg.png
    colmap/prepared.json   which file each one was made from, and its quality, so that a second run need not
                           read it again
"""
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from tqdm import tqdm

from scenes.errors import UserError, first_line
from scenes.files import atomic_write, read_json, write_text
from tools.capture.collect import Photo, Reason, has_alpha
from tools.capture.database import forget_photos
from tools.capture.quality import Quality, measure
from tools.capture.video import sharpest_frames

# Photos that another version of this file has prepared are prepared again.
VERSION = 2
# The shape of a mask may differ from that of its photo by this fraction, from rounding.
MAX_MASK_STRETCH = 0.02
# Quality of the JPEG files written, of 100.
JPEG_QUALITY = 95


@dataclass
class Entry:
    """What is known of a prepared photo."""
    source: list       # what it was made from: path, size and time of the file, and settings
    size: list         # width and height in pixels
    quality: Quality


class Prepared:
    """The work folder: prepared photos, and what is known of them.

    Args:
      folder: the work folder, created if it is missing.
      max_size: photos are reduced to this length of their longer side, in pixels.
    Attributes:
      images, masks: the folders of prepared photos and of their masks; the latter may not exist.
      database, vocabulary: files of `PoseEstimation`. What is outdated is deleted from them.
    """

    def __init__(self, folder, max_size):
        self.folder, self.images, self.masks = folder, folder / 'images', folder / 'masks'
        self.database, self.vocabulary = folder / 'database.db', folder / 'vocabulary.bin'
        self.index_file = folder / 'prepared.json'
        self.max_size = max_size
        self.images.mkdir(parents=True, exist_ok=True)
        content = read_json(self.index_file) if self.index_file.is_file() else {}
        known = content['photos'] if content.get('version') == VERSION else {}
        self.index = {name: Entry(entry['source'], entry['size'], Quality(**entry['quality']))
                      for name, entry in known.items()}
        self.written = set()  # names of photos that were prepared by this run

    def quality(self, name):
        """The `Quality` of a photo."""
        return self.index[name].quality

    def add_photos(self, photos, num_threads):
        """Prepare and measure photos, but for those that an earlier run has prepared from the same files.
        Photos that cannot be read get a reason.

        Raises:
          UserError: a mask cannot be used.
        """
        with ThreadPoolExecutor(num_threads) as pool:
            try:
                list(tqdm(pool.map(self.add_photo, photos), 'photos', len(photos), disable=None))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                self.save()
                raise
        self.keep_only(photos)

    def add_photo(self, photo):
        """Prepare and measure one photo."""
        source = self.describe(photo.source)
        if photo.mask:
            source += self.describe(photo.mask)
        if self.reuse(photo, source):
            return
        try:
            image = open_upright(photo.source)
        except Exception as error:  # each codec raises its own types of error for a damaged file
            photo.reason = Reason('unreadable', f'not a readable photo ({first_line(error)})')
            return
        self.write(photo, image, source)
        self.write_mask(photo)

    def add_video(self, path, num_frames):
        """Prepare and measure the sharpest frames of a video, as `sharpest_frames` finds them, unless an
        earlier run has; returns them as a list of `Photo`."""
        source = [*self.describe(path), num_frames]
        photos = [Photo(path, name, name, *entry.size) for name, entry in self.index.items()
                  if entry.source == source]
        if not photos or not all(self.reuse(photo, source) for photo in photos):
            photos, self.index = [], {}
            self.save()  # if this is interrupted, the next run must not take some frames for all
            for photo, image in sharpest_frames(path, num_frames):
                self.write(photo, image, source)
                photos.append(photo)
        self.keep_only(photos)
        return photos

    def describe(self, path):
        """What changes when the file at `path` is another one, or is to be prepared in another way."""
        status = path.stat()
        return [str(path.resolve()), status.st_size, status.st_mtime_ns, self.max_size]

    def reuse(self, photo, source):
        """Whether an earlier run has prepared this photo; if so its size and quality are noted."""
        entry, image, mask = (self.index.get(photo.name), self.images / photo.name,
                              self.mask_path(photo.name))
        if entry is None or entry.source != source or not image.is_file():
            return False
        if mask.is_file() != (photo.mask is not None) or size_of(image) != tuple(entry.size):
            return False  # an interrupted run has left only a part
        self.note(photo, entry)
        return True

    def note(self, photo, entry):
        """Note what is known of a photo, in the index and in the photo."""
        self.index[photo.name] = entry
        photo.resize(*entry.size)
        photo.sharpness, photo.exposure = entry.quality.sharpness, entry.quality.exposure

    def write(self, photo, image, source):
        """Write the upright `image` of a photo in its final size, and measure it. The file is copied if it
        is like that already."""
        full_size, image = image.size, fit(image, self.max_size)
        self.written.add(photo.name)
        with atomic_write(self.images / photo.name) as partial:
            if photo.as_is and image.size == full_size:
                shutil.copyfile(photo.source, partial)
            else:
                save(image, partial)
        self.note(photo, Entry(source, list(image.size), measure(image)))

    def write_mask(self, photo):
        """Write the mask of a photo, if it has one, in the photo's final size.

        Raises:
          UserError: the mask is damaged, or has another shape than the photo.
        """
        from PIL import Image
        path = self.mask_path(photo.name)
        path.unlink(missing_ok=True)
        if photo.mask is None:
            return
        try:
            mask = open_upright(photo.mask).convert('L')
        except Exception as error:  # as for photos
            raise UserError(f'{photo.mask}: not a readable mask ({first_line(error)})') from None
        if abs(mask.width / mask.height * photo.height / photo.width - 1) > MAX_MASK_STRETCH:
            raise UserError(f'{photo.mask}: found a mask of {mask.width}×{mask.height} pixels, expected one '
                            f'of the shape of {photo.shown}, such as {photo.width}×{photo.height}')
        self.masks.mkdir(exist_ok=True)
        with atomic_write(path) as partial:
            mask.resize((photo.width, photo.height), Image.Resampling.NEAREST).save(partial)

    def mask_path(self, name):
        """Where the mask of the photo `name` is, if it has one."""
        return self.masks / f'{name}.png'

    def keep_only(self, photos):
        """Delete what was prepared for other photos, and `save`."""
        names = {photo.name for photo in photos}
        self.index = {name: entry for name, entry in self.index.items() if name in names}
        for path in self.images.iterdir():
            if path.name not in self.index:
                path.unlink()
                self.mask_path(path.name).unlink(missing_ok=True)
        self.save()

    def save(self):
        """Write the index for the next run. Features of photos that were prepared anew, and a vocabulary
        that was built from them, are deleted first."""
        if forget_photos(self.database, self.written.__contains__):
            self.vocabulary.unlink(missing_ok=True)
        content = {'version': VERSION, 'photos': {name: asdict(entry) for name, entry in self.index.items()}}
        write_text(self.index_file, json.dumps(content, indent=1) + '\n')


def size_of(path):
    """Width and height of an image according to its header."""
    from PIL import Image
    with Image.open(path) as image:
        return image.size


def open_upright(path):
    """A photo as a Pillow image with 8 bit RGB or RGBA, turned as EXIF says."""
    from PIL import Image, ImageOps
    with Image.open(path) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(('I', 'F')):     # 16 bit
            image = image.convert('I').point(grey_of_16_bits).convert('L')
        wanted = 'RGBA' if has_alpha(image) else 'RGB'
        return image if image.mode == wanted else keep_info(image.convert(wanted), image)


def grey_of_16_bits(value):
    return value * (1 / 256)


def keep_info(converted, image):
    """`converted` with the metadata of `image`."""
    converted.info = {key: value for key, value in image.info.items() if key != 'transparency'}
    return converted


def fit(image, max_size):
    """The image, reduced so that its longer side has at most `max_size` pixels."""
    from PIL import Image
    scale = max_size / max(image.size)
    if scale >= 1:
        return image
    size = [max(1, round(side * scale)) for side in image.size]
    return keep_info(image.resize(size, Image.Resampling.LANCZOS), image)


def save(image, path):
    """Write a Pillow image as PNG or JPEG by the extension of `path`, with its EXIF and colour profile."""
    kept = {key: image.info[key] for key in ('exif', 'icc_profile') if image.info.get(key)}
    if path.suffix == '.png':
        image.save(path, compress_level=1, **kept)
    else:
        image.save(path, quality=JPEG_QUALITY, subsampling=0, **kept)
