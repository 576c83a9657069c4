"""Download the scenes of the NeRF and mip-NeRF 360 papers into the folders that the configs name.

    python tools/download.py lego fern                # data/nerf_synthetic/lego, data/nerf_llff_data/fern
    python tools/download.py blender llff             # all scenes of these sets; there is also mipnerf360
    python tools/download.py lego --source https://example.org/mirror

Several sources are tried in turn. Run the command again to continue an interrupted download. A scene gets its
name when it is complete, and scenes that are there are skipped.
"""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import http.client
import json
import re
import shutil
import socket
import ssl
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes.errors import UserError, first_line
from scenes.files import PARTIAL, atomic_folder, make_folder, read_json, write_text
from training.signals import Stopped, StopRequest

# A connection that sends nothing for this many seconds is broken.
TIMEOUT = 30
# After a request that brings nothing, the next one waits for this many seconds, then for twice as many.
RETRY_SECONDS = 1
# Data is read and written in pieces of this many bytes.
CHUNK = 1 << 18
# With these HTTP codes, and with all from 500 on, the same request may succeed later.
RETRY_CODES = (408, 425, 429)
# With these errors a host cannot be reached at all, for example because there is no network.
UNREACHABLE = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)

NERFBASELINES = 'https://huggingface.co/datasets/nerfbaselines/nerfbaselines-data/resolve/main/'
NERFMIRROR = 'https://github.com/yxlao/nerfmirror/releases/download/20220618/'
NERF_AUTHORS = 'https://cseweb.ucsd.edu/~viscomp/projects/LF/papers/ECCV20/nerf/'
MIPNERF360_AUTHORS = 'https://storage.googleapis.com/gresearch/refraw360/'
YOULIXIYA = 'https://huggingface.co/datasets/YouLiXiya/nerf/resolve/'

# The SHA-256 of the known versions of an archive. Archives that are not listed are checked by their size and
# by the checksums inside them.
SHA256 = {
    'nerf_synthetic.zip': ('f01fd1b4ab045b0d453917346f26f898657bb5bec4834b95fdad1f361826e45e',
                           '5e36e96ba8e3564835e9313a47f088aa26eeb88093dcccc695bdb1adec398efd'),
    'nerf_llff_data.zip': ('5794b432feaf4f25bcd603addc6ad0270cec588fed6a364b7952001f07466635',
                           'b8be42c77ce345e647812cb69d1f92d2a85159f2464847e99458e53d13cb1d96'),
}


class Archive(NamedTuple):
    """A zip file with scenes."""
    base: str            # URL of the source, with a slash at the end
    path: str            # below `base`; {scene} stands for the name of a scene
    scenes: tuple = ()   # what it holds; empty if there is an archive for each scene

    @property
    def url(self):
        return self.base + self.path

    @property
    def name(self):
        return PurePosixPath(self.path).name

    @property
    def host(self):
        return urlsplit(self.base).netloc


class SceneSet(NamedTuple):
    """Scenes in the same layout."""
    folder: str          # below --out
    page: str            # for people
    files: tuple         # a scene that has these is complete
    images: tuple        # folders of images: of each group an archive must hold one
    scenes: tuple
    archives: tuple      # in the order in which they are tried


class Scene(NamedTuple):
    """A scene to download."""
    name: str
    folder: Path
    page: str
    files: tuple
    images: tuple
    archives: tuple


BLENDER = ('chair', 'drums', 'ficus', 'hotdog', 'lego', 'materials', 'mic', 'ship')
LLFF = ('fern', 'flower', 'fortress', 'horns', 'leaves', 'orchids', 'room', 'trex')
MIPNERF360 = ('bicycle', 'bonsai', 'counter', 'garden', 'kitchen', 'room', 'stump')
MIPNERF360_EXTRA = ('flowers', 'treehill')
NERF_PAGE, MIPNERF360_PAGE = 'https://www.matthewtancik.com/nerf', 'https://jonbarron.info/mipnerf360'

SETS = {
    'blender': SceneSet(
        'nerf_synthetic', NERF_PAGE, ('transforms_train.json', 'transforms_val.json', 'transforms_test.json'),
        (('train/',), ('val/',), ('test/',)), BLENDER, (
            Archive(NERFBASELINES, 'blender/{scene}.zip'),
            Archive(NERF_AUTHORS, 'nerf_example_data.zip', ('lego', 'fern')),
            Archive(NERFMIRROR, 'nerf_synthetic.zip', BLENDER),
            Archive(YOULIXIYA + '3d80caf405540d16337de4fe3219bb69be7cbaa4/', 'nerf_synthetic.zip', BLENDER))),
    'llff': SceneSet(
        'nerf_llff_data', NERF_PAGE, ('poses_bounds.npy',),
        (('images/', 'images_8/'),), LLFF, (
            Archive(NERFBASELINES, 'llff/{scene}.zip'),
            Archive(NERF_AUTHORS, 'nerf_example_data.zip', ('lego', 'fern')),
            Archive(NERFMIRROR, 'nerf_llff_data.zip', LLFF),
            Archive(YOULIXIYA + '8bb2c1f48e1ee51a94bce0c1634dd04795f92faa/', 'nerf_llff_data.zip', LLFF))),
    'mipnerf360': SceneSet(
        'mipnerf360', MIPNERF360_PAGE, ('sparse/0/cameras.bin', 'sparse/0/images.bin'),
        (('images/',),), MIPNERF360 + MIPNERF360_EXTRA, (
            Archive(MIPNERF360_AUTHORS, '360_v2.zip', MIPNERF360),
            Archive(MIPNERF360_AUTHORS, '360_extra_scenes.zip', MIPNERF360_EXTRA),
            Archive(YOULIXIYA + 'c9b5a8bd455757aeac0f3f5bc51d1f957721d070/', '360_v2.zip', MIPNERF360))),
}


class SourceFailed(Exception):
    """A source does not provide an archive; the message says why."""


class Unreachable(SourceFailed):
    """The host of a source does not answer."""


class Damaged(SourceFailed):
    """An archive is complete, but cannot be used."""


class Broken(Exception):
    """A request failed; the next one may succeed."""


def say(line, file=None):
    """Print a line above a progress bar."""
    file = file or sys.stdout
    tqdm.write(line, file=file)
    file.flush()


def say_in_handler(line):
    with contextlib.suppress(RuntimeError):  # the signal has interrupted another write
        say(line, sys.stderr)


def warn(line):
    say(f'download.py: warning: {line}', sys.stderr)


def size_text(size):
    """1280000000 -> '1.28 GB'"""
    for unit in ('bytes', 'kB', 'MB', 'GB'):
        if size < 1000 or unit == 'GB':
            return f'{size:.0f} {unit}' if size >= 100 or unit == 'bytes' else f'{size:.3g} {unit}'
        size /= 1000


def progress_bar(name, total, initial=0):
    """A bar that counts bytes; not shown unless the output is a terminal."""
    return tqdm(desc=name, total=total, initial=initial, unit='B', unit_scale=True, disable=None, leave=False,
                dynamic_ncols=True)


@contextlib.contextmanager
def writing(path):
    """What goes wrong in this block, such as a full disk, is a problem of `path` that no source can help."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{path}: not written ({error.strerror or first_line(error)})') from None


def check_space(folder, needed, what):
    """Raise `UserError` if the disk of a folder has less than this many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f'{folder}: found {size_text(free)} of free disk space, expected {size_text(needed)} '
                        f'for {what}')


# --- scenes -------------------------------------------------------------------------------------------------

def find_scenes(names, out, mirrors):
    """The scenes with these names, each once.

    Args:
      names: scenes, sets, or set/scene for a name that two sets have.
      out: folder of all data.
      mirrors: base URLs to use in place of the built-in sources.
    Raises:
      UserError: there is no such scene or set.
    """
    scenes = {}
    for name in names:
        set_name, _, wanted = name.partition('/')
        if set_name not in SETS:
            wanted, set_name = name, next((key for key in SETS if name in SETS[key].scenes), None)
        found = [scene for scene in SETS[set_name].scenes if wanted in ('', scene)] if set_name else []
        if not found:
            raise UserError(f'{name}: no such scene or set; expected a scene or set of\n{list_of_scenes()}')
        scenes |= {(set_name, scene): make_scene(SETS[set_name], scene, out, mirrors) for scene in found}
    return list(scenes.values())


def make_scene(scene_set, name, out, mirrors):
    archives = [archive._replace(path=archive.path.format(scene=name)) for archive in scene_set.archives
                if name in archive.scenes or not archive.scenes]
    if mirrors:
        by_path = {archive.path: archive for archive in archives}
        archives = [archive._replace(base=base) for base in mirrors for archive in by_path.values()]
    return Scene(name, out / scene_set.folder / name, scene_set.page, scene_set.files, scene_set.images,
                 tuple(archives))


def list_of_scenes():
    return '\n'.join(f'  {name}: {" ".join(scene_set.scenes)}' for name, scene_set in SETS.items())


def is_complete(scene):
    """Whether a scene is in its folder.

    Raises:
      UserError: something else is there.
    """
    missing = [name for name in scene.files if not (scene.folder / name).is_file()]
    occupied = scene.folder.exists() and not (scene.folder.is_dir() and not any(scene.folder.iterdir()))
    if missing and occupied:
        raise UserError(f'{scene.folder}: found a folder without {missing[0]}, expected a complete scene or '
                        'none; move it away')
    return not missing


# --- downloads ----------------------------------------------------------------------------------------------

class Part:
    """The file that an archive is downloaded to. A note beside it says which version of the archive it is the
    beginning of; without the note it is worthless. The same archive of another source has another part.

    Attributes:
      version: an ETag or a date, None if the server sends neither.
      total: size of the complete file in bytes, None if the server does not say.
    """

    def __init__(self, folder, archive):
        self.url, self.version, self.total = archive.url, None, None
        self.path = folder / f'{archive.name}.{zlib.crc32(self.url.encode()):08x}{PARTIAL}'
        self.note = self.path.with_name(f'{self.path.name}.json')
        try:
            note = read_json(self.note)
            self.version, self.total = note['version'], note['total']
        except (UserError, LookupError, TypeError):
            self.remove()

    @property
    def size(self):
        """Bytes downloaded so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def is_complete(self):
        return self.size == self.total

    def begin(self, version, total):
        """Discard what is there, and begin with this version."""
        self.remove()
        self.version, self.total = version, total
        with writing(self.note):
            write_text(self.note, json.dumps({'url': self.url, 'version': version, 'total': total}))

    def remove(self):
        self.path.unlink(missing_ok=True)  # first: the note of another version would make it valid
        self.note.unlink(missing_ok=True)


def download(part, unpacked_share, retries):
    """Complete a part, with as many requests as it takes.

    Args:
      part: the `Part`.
      unpacked_share: of the archive's size, that unpacking will need.
      retries: requests in a row that may bring nothing new.
    Raises:
      SourceFailed: the server refuses, or requests bring nothing too often. The part stays as it is.
    """
    failures, connected, largest = 0, False, part.size
    while not part.is_complete:
        try:
            request(part, unpacked_share)
            return
        except Broken as error:
            problem, connected = str(error), True
        except OSError as error:
            problem = connection_problem(error)
            if is_unreachable(error) and not connected:
                raise Unreachable(problem) from None
        progress = part.size > largest
        connected, largest = connected or progress, max(largest, part.size)
        failures = 0 if progress else failures + 1
        if failures > retries:
            raise SourceFailed(problem) if connected else Unreachable(problem)
        again = f'continuing at {size_text(part.size)}' if part.size else 'trying again'
        warn(f'{part.url}: {problem}; {again}')
        if not progress:
            time.sleep(RETRY_SECONDS * 2 ** (failures - 1))


def request(part, unpacked_share):
    """Make one request, and append what it brings to a part.

    Raises:
      SourceFailed: the server refuses.
      Broken, OSError: the part is not complete; another request may succeed.
    """
    headers = {'User-Agent': 'nerf-download', 'Accept-Encoding': 'identity'}
    if part.size:
        headers['Range'] = f'bytes={part.size}-'
        if part.version:  # the whole file is sent if it has changed
            headers['If-Range'] = part.version
    try:
        response = urllib.request.urlopen(urllib.request.Request(part.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        problem = f'HTTP {error.code} {http.client.responses.get(error.code, "")}'.rstrip()
        if error.code == 416:  # nothing follows what is there, so that is not the beginning of this file
            part.remove()
        if error.code in (416, *RETRY_CODES) or error.code >= 500:
            raise Broken(problem) from None
        raise SourceFailed(problem) from None
    except http.client.HTTPException as error:
        raise Broken(f'not an HTTP answer ({type(error).__name__})') from None
    except ValueError as error:
        raise SourceFailed(f'not a URL ({first_line(error)})') from None
    with response:
        read_headers(part, response)
        if part.total:
            needed = part.total - part.size + unpacked_share * part.total
            check_space(part.path.parent, needed, f'{part.url} and its content')
        try:
            append(part, response)
        except http.client.HTTPException:
            raise Broken(f'the connection ended after {size_text(part.size)}') from None
    if part.total is not None and not part.is_complete:
        raise Broken(f'the connection ended after {size_text(part.size)} of {size_text(part.total)}')


def read_headers(part, response):
    """Check that an answer continues a part, or let the part begin anew."""
    if response.status == 206 and part.size:
        found = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', response.headers.get('Content-Range', ''))
        start, total = map(int, found.groups()) if found else (None, None)
        if start != part.size or part.total not in (None, total):
            part.remove()
            raise Broken('the file has changed')
        part.total = total
        return
    if part.size:
        warn(f'{part.url}: the file has changed, or the server cannot continue downloads; starting anew')
    etag = response.headers.get('ETag', '')
    version = etag if etag and not etag.startswith('W/') else response.headers.get('Last-Modified')
    length = response.headers.get('Content-Length', '')
    part.begin(version, int(length) if length.isdecimal() else None)


def append(part, response):
    """Append the body of an answer to a part, each piece as it arrives."""
    with writing(part.path):
        part.path.touch()
    name = PurePosixPath(part.url).name
    with open(part.path, 'ab') as file, progress_bar(name, part.total, part.size) as bar:
        while piece := response.read1(CHUNK):
            with writing(part.path):
                file.write(piece)
                file.flush()
            bar.update(len(piece))


def reason_of(error):
    """The error behind a `URLError`."""
    return error.reason if isinstance(error, urllib.error.URLError) else error


def connection_problem(error):
    error = reason_of(error)
    if isinstance(error, TimeoutError):
        return f'no answer for {TIMEOUT} s'
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def is_unreachable(error):
    error = reason_of(error)
    return (isinstance(error, socket.gaierror | ssl.SSLCertVerificationError)
            or (isinstance(error, OSError) and error.errno in UNREACHABLE))


def check_sha256(part, name):
    """Raise `Damaged` if the checksum of an archive is known, and that of a part is another."""
    if name not in SHA256:
        return
    digest = hashlib.sha256()
    with open(part.path, 'rb') as file, progress_bar(f'{name}: checksum', part.size) as bar:
        while piece := file.read(CHUNK):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() not in SHA256[name]:
        raise Damaged(f'found SHA-256 {digest.hexdigest()}, expected {" or ".join(SHA256[name])}')


# --- archives -----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def reading_zip():
    """What goes wrong in this block is the archive's fault."""
    try:
        yield
    except Exception as error:  # malformed archives raise errors of many types
        raise Damaged(f'not a zip file, or damaged ({first_line(error)})') from None


def scene_members(archive, scene):
    """The files of a scene in a zip file: pairs of `ZipInfo` and the path in the scene's folder.

    The scene is the folder of that name with the files that a scene needs, wherever it is in the archive.

    Raises:
      Damaged: the archive does not hold the scene, or its paths lead out of it.
    """
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if path.is_absolute() or '..' in path.parts or stat.S_ISLNK(info.external_attr >> 16):
            raise Damaged(f'found the unsafe path {info.filename!r} in it')
    names = set(archive.namelist())
    folders = [name.removesuffix(scene.files[0]) for name in names]
    folders = [folder for folder in folders if all(folder + name in names for name in scene.files)
               and (folder == '' or f'/{folder}'.endswith(f'/{scene.name}/'))]
    if not folders:
        raise Damaged(f'found no folder {scene.name}/ with {", ".join(scene.files)} in it')
    folder = min(folders, key=len)
    members = [(info, info.filename.removeprefix(folder)) for info in archive.infolist()
               if info.filename.startswith(folder) and not info.is_dir()]
    for group in scene.images:
        if not any(name.startswith(group) for _, name in members):
            raise Damaged(f'found no images in {folder}{" or ".join(group)}')
    return members


def unpack(path, scene):
    """Unpack a scene from a zip file into its folder, which appears when it is complete.

    Raises:
      Damaged: the archive cannot be read, or does not hold the scene.
      UserError: the disk is full, or cannot be written.
    """
    with reading_zip():
        archive = zipfile.ZipFile(path)
    with archive:
        members = scene_members(archive, scene)
        total = sum(info.file_size for info, _ in members)
        parent = make_folder(scene.folder.parent)
        for leftover in parent.glob(f'.{scene.name}{PARTIAL}*'):  # of a killed process
            shutil.rmtree(leftover)
        check_space(parent, total, f'{scene.name} unpacked')
        with atomic_folder(scene.folder) as partial, progress_bar(f'{scene.name}: unpacking', total) as bar:
            for info, name in members:
                unpack_file(archive, info, partial / name, bar)
    say(f'{scene.folder}: {len(members)} files, {size_text(total)}')


def unpack_file(archive, info, path, bar):
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with reading_zip():
        source = archive.open(info)
    with source, open(path, 'wb') as file:
        while True:
            with reading_zip():
                piece = source.read(CHUNK)
            if not piece:
                break
            with writing(path):
                file.write(piece)
                file.flush()
            bar.update(len(piece))


def provide(scene, downloads, retries, unreachable):
    """Download and unpack a scene from the first source that works; returns whether one did.

    Args:
      scene: the `Scene`.
      downloads: folder of archives. Those that are there are used first.
      retries: see `download`.
      unreachable: hosts that are not tried; those that do not answer are added.
    """
    for path in dict.fromkeys(downloads / archive.name for archive in scene.archives):
        if path.is_file():
            try:
                unpack(path, scene)
                return True
            except Damaged as error:
                warn(f'{path}: {error}')
    for archive in scene.archives:
        if archive.host in unreachable:
            continue
        part = Part(downloads, archive)
        try:
            say(f'{scene.folder}: downloading {archive.url}')
            download(part, 1 / max(1, len(archive.scenes)), retries)
            check_sha256(part, archive.name)
            unpack(part.path, scene)
        except SourceFailed as error:
            warn(f'{archive.url}: {error}')
            if isinstance(error, Damaged):
                part.remove()
            if isinstance(error, Unreachable):
                unreachable.add(archive.host)
        else:
            if archive.scenes:  # keep it for the others
                part.path.rename(downloads / archive.name)
            for other in scene.archives:
                if other.name == archive.name or not other.scenes:
                    Part(downloads, other).remove()
            return True
    return False


def by_hand(scenes, downloads):
    """What to do where no source works, in a few lines."""
    urls = {}
    for scene in scenes:
        for archive in scene.archives:
            urls.setdefault(archive.url, []).append(scene.name)
    names = ', '.join(scene.name for scene in scenes)
    pages = ' and '.join(dict.fromkeys(scene.page for scene in scenes))
    return '\n'.join([
        f'{names}: no source works; run the command again later, or put one of these files into {downloads} '
        'and run it again:',
        *[f'  {url} ({", ".join(held)})' for url, held in urls.items()],
        f'or unpack an archive from {pages} so that these files exist:',
        *[f'  {scene.folder / scene.files[0]}' for scene in scenes]])


# --- command line -------------------------------------------------------------------------------------------

def url_of_folder(text):
    """A base URL, as a type for argparse."""
    parts = urlsplit(text)
    if parts.scheme not in ('http', 'https') or not parts.hostname or parts.port == 0:
        raise argparse.ArgumentTypeError(f'found {text}, expected http://… or https://…')
    return text.rstrip('/') + '/'


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f'sets and their scenes:\n{list_of_scenes()}\nroom is llff/room, not mipnerf360/room')
    parser.add_argument('names', nargs='+', metavar='NAME', help='a scene, a set of scenes, or set/scene')
    parser.add_argument('--out', type=Path, default=Path('data'), help='folder of all data; default: data')
    parser.add_argument('--source', type=url_of_folder, action='append', default=[], metavar='URL',
                        help='a mirror with blender/lego.zip, nerf_synthetic.zip and so on, in place of the '
                             'built-in sources; may be given several times')
    parser.add_argument('--retries', type=int, default=4,
                        help='requests that may fail before the next source is tried; default: 4')
    return parser


@contextlib.contextmanager
def only_process(folder):
    """Wait until no other process downloads to a folder."""
    with open(folder / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'waiting for another download to {folder}')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download_scenes(args):
    """Download what `args` ask for; returns the exit code.

    Raises:
      UserError: a name is unknown, the disk is full, or no source works.
    """
    failed, unreachable, code = [], set(), 0
    scenes = find_scenes(args.names, args.out, args.source)
    downloads = make_folder(args.out / 'downloads')
    with only_process(downloads):
        for scene in scenes:
            try:
                if is_complete(scene):
                    say(f'{scene.folder}: is there already')
                elif not provide(scene, downloads, args.retries, unreachable):
                    failed.append(scene)
            except UserError as error:
                say(f'download.py: error: {error}', sys.stderr)
                code = 2
        for path in sorted(downloads.glob('*.zip')):
            say(f'{path}: {size_text(path.stat().st_size)}, kept for its other scenes; you may delete it')
    if failed:
        raise UserError(by_hand(failed, downloads))
    return code


def main(argv=None):
    """Run the program; returns 0, 2 for errors that the user can fix, 128 + n for signal n."""
    args = make_parser().parse_args(argv)
    try:
        with StopRequest(say_in_handler) as stop, stop.interruptible():
            return download_scenes(args)
    except Stopped as stopped:
        say('run the same command again to continue', sys.stderr)
        return stopped.exit_code
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f'{error.filename}: {error.strerror}' if error.filename else first_line(error)
    say(f'download.py: error: {problem}', sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
