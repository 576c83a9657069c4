"""Photos made ready for pose estimation: upright, not larger than needed, with EXIF, and measured.

    colmap/images/         the photos
    colmap/masks/          their masks, if there are any; named as COLMAP wants it, photo.jpg.png
    colmap/prepared.json   which file each one was made of, and its quality, so that a second run need not
                           read it again
"""
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from tqdm import tqdm

from scenes.errors import first_line
from scenes.files import atomic_write, read_json, write_text
from tools.capture.collect import Photo, has_alpha
from tools.capture.quality import Quality, measure
from tools.capture.video import sharpest_frames

# Photos that were prepared by another version are prepared again.
VERSION = 1
# Quality of the JPEG files written, of 100.
JPEG_QUALITY = 95


class Prepared:
    """The work folder: prepared photos, and what is known of them.

    Args:
      folder: the work folder, created if it is missing.
      max_size: photos are reduced to this length of their longer side, in pixels.
    Attributes:
      images: the folder of prepared photos.
      qualities: dict name → `Quality`.
      changed: whether a photo that was prepared by an earlier run had to be prepared again.
    """

    def __init__(self, folder, max_size):
        self.folder, self.images, self.masks = folder, folder / 'images', folder / 'masks'
        self.max_size = max_size
        self.images.mkdir(parents=True, exist_ok=True)
        self.index_file = folder / 'prepared.json'
        self.known = read_json(self.index_file) if self.index_file.is_file() else {}
        self.qualities, self.sources, self.changed = {}, {}, False

    def add_photos(self, photos, num_threads):
        """Prepare and measure photos. Those that cannot be read get a reason."""
        with ThreadPoolExecutor(num_threads) as pool:
            try:
                list(tqdm(pool.map(self.add_photo, photos), 'photos', len(photos), disable=None))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.save()

    def add_photo(self, photo):
        """Prepare and measure one photo, unless an earlier run has."""
        status = photo.source.stat()
        source = [VERSION, str(photo.source.resolve()), status.st_size, status.st_mtime_ns, self.max_size]
        if photo.mask:
            source += [str(photo.mask.resolve()), photo.mask.stat().st_mtime_ns]
        if not self.reuse(photo, source):
            try:
                self.write(photo, open_upright(photo.source), photo.as_is)
                self.write_mask(photo)
            except Exception as error:  # each codec raises its own types of error for a damaged file
                photo.reason = f'not a readable photo ({first_line(error)})'
                return
        self.take(photo, source)

    def add_video(self, path, num_frames):
        """Prepare and measure the sharpest frames of a video; returns them as a list of `Photo`."""
        status = path.stat()
        source = [VERSION, str(path.resolve()), status.st_size, status.st_mtime_ns, self.max_size, num_frames]
        photos = self.known_frames(path, source)
        if not photos:
            for photo, image in sharpest_frames(path, num_frames):
                self.changed |= photo.name in self.known
                self.write(photo, image)
                photos.append(photo)
        for photo in photos:
            self.take(photo, source)
        self.save()
        return photos

    def known_frames(self, path, source):
        """The frames of a video that an earlier run has prepared with the same settings; empty if none."""
        names = [name for name, entry in self.known.items()
                 if entry['source'] == source and (self.images / name).is_file()]
        photos = [Photo(path, name, *self.known[name]['size']) for name in names]
        for photo in photos:
            self.reuse(photo, source)
        return photos

    def reuse(self, photo, source):
        """Whether an earlier run has prepared this photo; if so its quality is known."""
        entry = self.known.get(photo.name)
        if entry is None or not (self.images / photo.name).is_file():
            return False
        if entry['source'] != source:
            self.changed = True
            return False
        self.qualities[photo.name] = Quality(**entry['quality'])
        photo.resize(*entry['size'])
        return True

    def write(self, photo, image, as_is=False):
        """Write the upright `image` of a photo in its final size, and measure it. With `as_is` the file is
        copied if it is not too large."""
        full_size = image.size
        image = fit(image, self.max_size)
        photo.resize(*image.size)
        self.qualities[photo.name] = measure(image)
        with atomic_write(self.images / photo.name) as partial:
            if as_is and image.size == full_size:
                shutil.copyfile(photo.source, partial)
            else:
                save(image, partial)

    def write_mask(self, photo):
        """Write the mask of a photo, if it has one, in the photo's final size."""
        from PIL import Image
        path = self.mask_path(photo.name)
        path.unlink(missing_ok=True)
        if photo.mask is None:
            return
        self.masks.mkdir(exist_ok=True)
        mask = open_upright(photo.mask).convert('L')
        mask = mask.resize((photo.width, photo.height), Image.Resampling.NEAREST)
        with atomic_write(path) as partial:
            mask.save(partial)

    def mask_path(self, name):
        """Where the mask of the photo `name` is, if it has one."""
        return self.masks / f'{name}.png'

    def take(self, photo, source):
        quality = self.qualities[photo.name]
        photo.sharpness, photo.exposure = quality.sharpness, quality.exposure
        self.sources[photo.name] = source, [photo.width, photo.height]

    def save(self):
        """Write the index for the next run. Features of photos that have changed are forgotten before."""
        if self.changed:
            for path in (*self.folder.glob('database.db*'), *self.folder.glob('vocabulary.bin')):
                path.unlink()
        index = {name: {'source': source, 'size': size, 'quality': asdict(self.qualities[name])}
                 for name, (source, size) in self.sources.items()}
        write_text(self.index_file, json.dumps(index, indent=1) + '\n')


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
