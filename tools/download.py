"""Download the scenes of the NeRF and mip-NeRF 360 papers into the folders that the configs name.

    python tools/download.py lego fern                # data/nerf_synthetic/lego, data/nerf_llff_data/fern
    python tools/download.py blender llff             # all scenes of these sets; there is also mipnerf360
    python tools/download.py lego --source https://example.org/mirror

Several sources are tried in turn. Run the command again to continue an interrupted download. A scene gets its
name when it is complete, and scenes that are there are skipped.
"""
import argparse
import contextlib
import sys
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes.errors import UserError, first_line, print_any_text
from scenes.files import make_folder
from tools.datasets.archives import unpack
from tools.datasets.sources import find_scenes, is_complete, list_of_scenes
from tools.datasets.transfer import (
    Damaged,
    Part,
    SourceFailed,
    Unreachable,
    check_sha256,
    download,
    say,
    size_text,
    warn,
)
from training.signals import Stopped, StopRequest


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
    """Wait until no other process downloads to a folder. On Windows there is no such lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / '.lock', 'wb') as file:
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


def say_in_handler(line):
    with contextlib.suppress(RuntimeError):  # the signal has interrupted another write
        say(line, sys.stderr)


def main(argv=None):
    """Run the program; returns 0, 2 for errors that the user can fix, 128 + n for signal n."""
    print_any_text()
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
