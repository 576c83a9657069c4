"""Downloads of large files over HTTP that survive interruptions, and that another run continues."""
import contextlib
import errno
import hashlib
import http.client
import json
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import PurePosixPath

from tqdm import tqdm

from scenes.errors import UserError, first_line
from scenes.files import PARTIAL, read_json, write_text
from tools.datasets.sources import SHA256

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
