"""tools/download.py against servers on this machine: good ones, and ones that do everything wrong."""
import contextlib
import hashlib
import io
import random
import resource
import shutil
import signal
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_runs import ROOT, finish, start
from tiny_scenes import blender_scene, llff_scene

from load_blender import load_blender_data
from scenes.errors import UserError
from tools import download
from tools.datasets import transfer
from tools.datasets.archives import unpack
from tools.datasets.sources import SHA256, find_scenes
from tools.datasets.transfer import Damaged, Part

LEGO, FERN = '/blender/lego.zip', '/llff/fern.zip'


# --- servers ------------------------------------------------------------------------------------------------

class Server(ThreadingHTTPServer):
    """Serves `files`, with the faults that are set.

    Attributes:
      files: URL path → bytes.
      ranges: whether Range is supported, and If-Range with it.
      etag: function of a file's bytes to its ETag, or None.
      cut: a response ends after this many bytes of its body.
      length: added to the Content-Length of whole files.
      codes: HTTP codes of the next requests; afterwards all is well.
      pause: seconds after each 10 kB.
      after: called when a response is complete, before its connection is closed.
      log: of each request (path, Range header, bytes sent).
    """
    daemon_threads = True

    def __init__(self, files):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.ranges, self.cut, self.length, self.codes, self.pause = files, True, None, 0, [], 0
        self.etag = lambda data: f'"{hashlib.md5(data).hexdigest()}"'
        self.after, self.log = lambda: None, []
        self.url = f'http://127.0.0.1:{self.server_port}'
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def sent(self, path):
        """Bytes sent of a file."""
        return sum(size for logged, _, size in self.log if logged == path)

    def handle_error(self, *_):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.respond()
        self.server.after()

    def respond(self):
        server, data = self.server, self.server.files.get(self.path)
        log = [self.path, self.headers.get('Range'), 0]
        server.log.append(log)
        code = server.codes.pop(0) if server.codes else 200
        if data is None or code != 200:
            self.send_error(404 if code == 200 else code)
            return
        if isinstance(data, str):
            self.send_response(302)
            self.send_header('Location', data)
            self.end_headers()
            return
        etag = server.etag and server.etag(data)
        body = data
        if server.ranges and log[1] and self.headers.get('If-Range') in (None, etag):
            begin = int(log[1].removeprefix('bytes=').removesuffix('-'))
            if begin >= len(data):
                self.send_error(416)
                return
            body = data[begin:]
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {begin}-{len(data) - 1}/{len(data)}')
            self.send_header('Content-Length', str(len(body)))
        else:
            self.send_response(200)
            if server.length is not None:
                self.send_header('Content-Length', str(len(data) + server.length))
        if etag:
            self.send_header('ETag', etag)
        self.end_headers()
        for begin in range(0, len(body[:server.cut]), 10000):
            piece = body[:server.cut][begin:begin + 10000]
            self.wfile.write(piece)
            log[2] += len(piece)
            time.sleep(server.pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Start a server of these files."""
    servers = []

    def serve(files):
        servers.append(Server(files))
        return servers[-1]
    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(transfer, 'RETRY_SECONDS', 0)


# --- scenes and archives ------------------------------------------------------------------------------------

def zip_of(files, compression=zipfile.ZIP_STORED):
    """A zip file with these contents, name → bytes, as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def contents(folder):
    """Relative path → bytes of all files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob('*') if path.is_file()}


def prefixed(prefix, files):
    return {prefix + name: content for name, content in files.items()}


@pytest.fixture(scope='module')
def lego(tmp_path_factory):
    """The files of a scene in the Blender layout, 60 kB."""
    folder = blender_scene(tmp_path_factory.mktemp('lego') / 'lego')
    (folder / 'train/extra.bin').write_bytes(random.Random(0).randbytes(60000))
    return contents(folder)


@pytest.fixture(scope='module')
def fern(tmp_path_factory):
    """The files of a scene in the LLFF layout."""
    return contents(llff_scene(tmp_path_factory.mktemp('fern') / 'fern'))


def run(out, *args, servers=()):
    """Run the tool in this process; returns its exit code."""
    sources = [option for server in servers for option in ('--source', server.url)]
    return download.main([*map(str, args), '--out', str(out), *sources])


def start_tool(out, *args, servers=(), **options):
    sources = [option for server in servers for option in ('--source', server.url)]
    return start(*args, '--out', out, *sources, script=ROOT / 'tools/download.py', **options)


def scene_of(out, name='lego'):
    """The files of a scene that was unpacked, or None."""
    (folder,) = [scene.folder for scene in find_scenes([name], out, [])]
    return contents(folder) if folder.exists() else None


def left_over(out):
    """What is in the folder of the downloads, and what is half unpacked."""
    return ([path.name for path in (out / 'downloads').iterdir() if path.name != '.lock']
            + [path.name for path in out.glob('nerf*/.*')])


# --- what should happen -------------------------------------------------------------------------------------

def test_scenes_are_downloaded_and_unpacked(serve, tmp_path, lego, fern, capsys):
    server = serve({LEGO: zip_of(prefixed('lego/', lego)), FERN: zip_of(prefixed('fern/', fern))})
    assert run(tmp_path, 'lego', 'fern', servers=[server]) == 0
    assert scene_of(tmp_path) == lego and scene_of(tmp_path, 'fern') == fern
    assert left_over(tmp_path) == []
    imgs, *_ = load_blender_data(tmp_path / 'nerf_synthetic/lego')
    assert imgs.shape[0] == 9
    assert 'data' not in capsys.readouterr().err


def test_what_is_there_is_not_downloaded_again(serve, tmp_path, lego, fern):
    server = serve({LEGO: zip_of(prefixed('lego/', lego)), FERN: zip_of(prefixed('fern/', fern))})
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert run(tmp_path, 'lego', 'fern', 'blender/lego', servers=[server]) == 0
    assert [path for path, _, _ in server.log] == [LEGO, FERN]


@pytest.mark.parametrize('prefix', ['nerf_synthetic/lego/', 'all/nerf_synthetic/lego/', 'lego/', ''])
def test_a_scene_is_found_wherever_it_is_in_the_archive(serve, tmp_path, lego, fern, prefix):
    others = prefixed('nerf_synthetic/chair/', lego) | prefixed('an/older/version/of/lego/', fern | lego)
    others['__MACOSX/nerf_synthetic/lego/._r_0.png'] = b'x'
    server = serve({LEGO: zip_of(others | prefixed(prefix, lego))})
    assert run(tmp_path, 'lego', servers=[server]) == 0
    if prefix:
        assert scene_of(tmp_path) == lego
    else:
        assert lego.items() <= scene_of(tmp_path).items()


def test_names_of_scenes_and_sets(tmp_path):
    def folders(*names):
        scenes = find_scenes(names, tmp_path, [])
        return [scene.folder.relative_to(tmp_path).as_posix() for scene in scenes]
    assert folders('lego', 'fern', 'lego', 'blender/lego') == ['nerf_synthetic/lego', 'nerf_llff_data/fern']
    assert folders('room', 'mipnerf360/room') == ['nerf_llff_data/room', 'mipnerf360/room']
    assert [len(folders(name)) for name in ('blender', 'llff', 'mipnerf360')] == [8, 8, 9]
    for name in ('nothing', 'blender/fern', 'LEGO', ''):
        with pytest.raises(UserError, match=f'^{name}: no such scene or set'):
            folders(name)


def test_scenes_come_to_where_the_configs_look_for_them():
    for path in (ROOT / 'configs').rglob('*.txt'):
        (folder,) = [line.split('=')[1].strip() for line in path.read_text().splitlines()
                     if line.startswith('datadir')] or [None]
        if folder and folder != './data/demo':
            name = folder.removeprefix('./data/') if 'mipnerf360' in folder else folder.rpartition('/')[2]
            (scene,) = find_scenes([name], Path('data'), [])
            assert scene.folder == Path(folder)


def test_every_scene_has_more_than_one_source():
    for scene in find_scenes(['blender', 'llff', 'mipnerf360'], Path('data'), []):
        hosts = {archive.url for archive in scene.archives}
        assert len(hosts) >= (1 if scene.name in ('flowers', 'treehill') else 2), scene.name


def test_an_archive_of_many_scenes_is_downloaded_once(serve, tmp_path, lego, monkeypatch):
    data = zip_of(prefixed('nerf_synthetic/lego/', lego) | prefixed('nerf_synthetic/chair/', lego))
    monkeypatch.setitem(SHA256, 'nerf_synthetic.zip', (hashlib.sha256(data).hexdigest(),))
    server = serve({'/nerf_synthetic.zip': data})
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert run(tmp_path, 'chair', servers=[server]) == 0
    assert scene_of(tmp_path) == scene_of(tmp_path, 'chair') == lego
    assert server.sent('/nerf_synthetic.zip') == len(data)
    assert left_over(tmp_path) == ['nerf_synthetic.zip']


def test_an_archive_put_there_by_hand_is_used(serve, tmp_path, lego):
    (tmp_path / 'downloads').mkdir()
    (tmp_path / 'downloads/nerf_synthetic.zip').write_bytes(zip_of(prefixed('nerf_synthetic/lego/', lego)))
    server = serve({})
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego and server.log == []
    assert left_over(tmp_path) == ['nerf_synthetic.zip']


def test_redirections_are_followed(serve, tmp_path, lego):
    server = serve({LEGO: '/somewhere/else', '/somewhere/else': zip_of(prefixed('lego/', lego))})
    server.cut = 20000
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego


def test_two_processes_download_a_scene_once(serve, tmp_path, lego):
    server = serve({LEGO: zip_of(prefixed('lego/', lego))})
    server.pause = 0.1
    processes = [start_tool(tmp_path, 'lego', servers=[server]) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [code for code, _ in results] == [0, 0], results
    assert scene_of(tmp_path) == lego and len(server.log) == 1
    assert any('waiting for another download' in output for _, output in results)


# --- servers that fail --------------------------------------------------------------------------------------

def test_a_broken_connection_continues_without_sending_anything_twice(serve, tmp_path, lego, capsys):
    data = zip_of(prefixed('lego/', lego))
    server = serve({LEGO: data})
    server.cut = 20000
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego
    assert server.sent(LEGO) == len(data) and len(server.log) == -(-len(data) // 20000) > 2
    assert '; continuing at 20 kB' in capsys.readouterr().err


def test_a_server_without_range_starts_anew(serve, tmp_path, lego, capsys):
    data = zip_of(prefixed('lego/', lego))
    server = serve({LEGO: data})
    server.ranges, server.cut = False, 20000
    assert run(tmp_path, 'lego', '--retries', 2, servers=[server]) == 2
    assert scene_of(tmp_path) is None
    assert server.sent(LEGO) == 4 * 20000  # the first request brings something, three bring nothing new
    server.cut = None
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego
    assert 'starting anew' in capsys.readouterr().err


@pytest.mark.parametrize('etag', [True, False])
@pytest.mark.parametrize('same_size', [True, False])
def test_a_file_that_changes_between_two_requests(serve, tmp_path, lego, etag, same_size):
    """Without an ETag, a change that keeps the size is noticed in the checksums of the archive."""
    old = {'train/extra.bin': bytes(60000)} | lego
    new = {'train/extra.bin': bytes([1]) * 60000} | {name: lego[name] for name in lego if 'extra' not in name}
    if not same_size:
        new['new'] = b'new'
    old['train/extra.bin'] = bytes(60000)
    server = serve({LEGO: zip_of(prefixed('lego/', old))})
    server.cut = 30000
    if not etag:
        server.etag = None

    def change():
        server.files[LEGO], server.cut = zip_of(prefixed('lego/', new)), None
    server.after = change
    code = run(tmp_path, 'lego', servers=[server])
    if not etag and same_size:
        assert code == 2 and scene_of(tmp_path) is None and left_over(tmp_path) == []
        code = run(tmp_path, 'lego', servers=[server])
    assert code == 0 and scene_of(tmp_path) == new and left_over(tmp_path) == []


FAULTS = {
    'HTTP 404': lambda server: setattr(server, 'files', {}),
    'HTTP 403': lambda server: setattr(server, 'codes', [403] * 9),
    'HTTP 500': lambda server: setattr(server, 'codes', [500] * 9),
    'HTTP 416': lambda server: setattr(server, 'codes', [416] * 9),
    'ended after': lambda server: setattr(server, 'length', 5000),
    'damaged': lambda server: setattr(server, 'length', -5000),
    'not a zip file': lambda server: server.files.update({LEGO: b'<!DOCTYPE html>please log in'}),
    'no folder lego/': lambda server: server.files.update({LEGO: zip_of({'chair/r_0.png': b''})}),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_the_second_source_is_used_when_the_first_fails(serve, tmp_path, lego, fault, capsys):
    bad, good = (serve({LEGO: zip_of(prefixed('lego/', lego))}) for _ in range(2))
    FAULTS[fault](bad)
    assert run(tmp_path, 'lego', '--retries', 1, servers=[bad, good]) == 0
    assert scene_of(tmp_path) == lego and left_over(tmp_path) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 6 and all(line.startswith(f'download.py: warning: {bad.url}/') for line in lines)
    assert any(fault in line for line in lines)


def test_a_server_error_is_retried_and_a_refusal_is_not(serve, tmp_path, lego):
    server = serve({LEGO: zip_of(prefixed('lego/', lego))})
    server.codes = [500, 503, 429]
    assert run(tmp_path, 'lego', '--retries', 3, servers=[server]) == 0
    assert len(server.log) == 4
    server = serve({})
    assert run(tmp_path, 'fern', '--retries', 3, servers=[server]) == 2
    assert len({path for path, _, _ in server.log}) == len(server.log)


def test_a_file_without_a_length(serve, tmp_path, lego):
    """Neither its end nor its connection's says that something is missing; the archive itself does."""
    server = serve({LEGO: zip_of(prefixed('lego/', lego))})
    server.length, server.cut = None, 30000
    assert run(tmp_path, 'lego', servers=[server]) == 2
    assert scene_of(tmp_path) is None and left_over(tmp_path) == []
    server.cut = None
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego


def test_a_part_that_is_complete_without_saying_so_is_downloaded_anew(serve, tmp_path, lego):
    """A process was killed at the end of a file whose length the server did not say."""
    data = zip_of(prefixed('lego/', lego))
    server = serve({LEGO: data})
    (scene,) = find_scenes(['lego'], tmp_path, [f'{server.url}/'])
    (tmp_path / 'downloads').mkdir()
    part = Part(tmp_path / 'downloads', scene.archives[0])
    part.begin(None, None)
    part.path.write_bytes(data)
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego
    assert [asked for _, asked, _ in server.log] == [f'bytes={len(data)}-', None]


def test_a_server_that_falls_silent(serve, tmp_path, lego, monkeypatch, capsys):
    monkeypatch.setattr(transfer, 'TIMEOUT', 0.2)
    server = serve({LEGO: zip_of(prefixed('lego/', lego))})
    server.pause = 0.5
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego
    assert 'no answer for 0.2 s; continuing at' in capsys.readouterr().err


def test_an_unreachable_host_is_tried_once_and_the_way_by_hand_is_told(tmp_path, capsys):
    with socket.socket() as closed:
        closed.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{closed.getsockname()[1]}/data'
        assert run(tmp_path, 'lego', 'fern', '--source', url) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if 'Connection refused' in line]) == 1
    told = '\n'.join(lines)
    assert f'put one of these files into {tmp_path}/downloads' in told
    assert f'  {url}/blender/lego.zip (lego)' in told
    assert f'  {url}/nerf_example_data.zip (lego, fern)' in told
    assert f'  {tmp_path}/nerf_llff_data/fern/poses_bounds.npy' in told and 'Traceback' not in told


def test_whatever_the_server_does_a_scene_is_exact_or_absent(serve, tmp_path, lego, capsys):
    """Random faults, one set for each request; then the server recovers."""
    data = zip_of(prefixed('lego/', lego))
    server, outcomes = serve({}), set()
    for seed in range(40):
        chance, out = random.Random(seed), tmp_path / str(seed)
        out.mkdir()

        def misbehave(chance=chance):
            damaged = bytearray(data)
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            server.files = chance.choice([{LEGO: data}] * 4 + [{LEGO: bytes(damaged)}, {LEGO: data[:-7]}, {}])
            server.cut = chance.choice([None, 0, 1, chance.randrange(len(data))])
            server.ranges = chance.random() < 0.8
            server.length = chance.choice([0, 0, 0, None, -1, 100])
            server.codes = chance.choice([[]] * 4 + [[500], [416], [206]])
            server.etag = chance.choice([None, hash, lambda data: 'W/"weak"', lambda data: '"1"'])
            server.etag = server.etag and (lambda data, etag=server.etag: str(etag(data)))
        server.after = misbehave
        misbehave()
        code = run(out, 'lego', '--retries', 2, servers=[server])
        outcomes.add(code)
        assert 'Traceback' not in capsys.readouterr().err
        found = scene_of(out)
        assert (code, found is None) in ((0, False), (2, True)), seed
        if found is not None and found != lego:  # only names and times have no checksum
            assert sorted(found.values()) == sorted(lego.values()), seed
        server.after = lambda: None
        server.files, server.cut, server.ranges, server.length, server.codes = {LEGO: data}, None, True, 0, []
        server.etag = lambda data: '"good"'
        if code:
            run(out, 'lego', servers=[server])
            assert run(out, 'lego', servers=[server]) == 0
            assert scene_of(out) == lego, seed
    assert outcomes == {0, 2}


ANSWERS = {
    'nothing': b'',
    'no HTTP': b'220 ftp server ready\r\n\r\n',
    'half a header': b'HTTP/1.1 200 OK\r\nContent-Le',
    'a header without end': b'HTTP/1.1 200 OK\r\n' + b'x' * 70000,
    'a length that is no number': b'HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc',
    'a broken chunk': b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab',
    'a chunk without a size': b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab',
    'a part that was not asked for': b'HTTP/1.1 206 Partial\r\nContent-Range: bytes 5-9/10\r\n\r\nabcde',
    'a redirection to a file': b'HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n',
    'a redirection to no URL': b'HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n',
    'a redirection to itself': b'HTTP/1.1 302 Found\r\nLocation: /blender/lego.zip\r\n\r\n',
    'an unknown code': b'HTTP/1.1 999 \x1b[2J\r\n\r\n',
}


@pytest.mark.parametrize('answer', ANSWERS)
def test_nonsense_from_a_server_ends_in_clear_lines(tmp_path, answer, capsys):
    with socket.create_server(('127.0.0.1', 0)) as listener:
        def serve():
            with contextlib.suppress(OSError):  # closed after the test
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(ANSWERS[answer])
        threading.Thread(target=serve, daemon=True).start()
        url = f'http://127.0.0.1:{listener.getsockname()[1]}'
        assert run(tmp_path, 'ship', '--retries', 0, '--source', url) == 2
        listener.shutdown(socket.SHUT_RDWR)
    assert not (tmp_path / 'nerf_synthetic').exists()
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if 'warning' in line]
    assert 2 <= len(warnings) <= 6
    assert all(line.startswith(f'download.py: warning: {url}/') for line in warnings)
    assert '\x1b' not in ''.join(lines) and max(map(len, lines)) < 500


# --- archives that should not be used -----------------------------------------------------------------------

def test_an_archive_with_a_wrong_checksum_is_refused(serve, tmp_path, lego, capsys):
    data = zip_of(prefixed('nerf_synthetic/lego/', lego))
    server = serve({'/nerf_synthetic.zip': data})
    assert run(tmp_path, 'lego', servers=[server]) == 2
    assert scene_of(tmp_path) is None and left_over(tmp_path) == []
    assert f'found SHA-256 {hashlib.sha256(data).hexdigest()}, expected f01fd1b4' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['../evil', '/tmp/evil', 'lego/../../evil', 'lego/train/../../../../evil'])
def test_an_archive_whose_paths_lead_out_of_it_is_refused(serve, tmp_path, lego, name, capsys):
    out = tmp_path / 'deep/data'
    server = serve({LEGO: zip_of(prefixed('lego/', lego) | {name: b'evil'})})
    assert run(out, 'lego', servers=[server]) == 2
    assert scene_of(out) is None and left_over(out) == []
    assert not list(tmp_path.rglob('*evil*')) and not Path('/tmp/evil').exists()
    assert 'unsafe path' in capsys.readouterr().err


def test_an_archive_with_a_link_is_refused(serve, tmp_path, lego):
    link = zipfile.ZipInfo('lego/link')
    link.create_system, link.external_attr = 3, 0o120777 << 16
    server = serve({LEGO: zip_of(prefixed('lego/', lego) | {link: b'/etc/passwd'})})
    assert run(tmp_path, 'lego', servers=[server]) == 2
    assert scene_of(tmp_path) is None


def test_an_archive_without_images_is_refused(serve, tmp_path, lego, capsys):
    few = {name: content for name, content in lego.items() if not name.startswith('test/')}
    bad, good = serve({LEGO: zip_of(prefixed('lego/', few))}), serve({LEGO: zip_of(prefixed('lego/', lego))})
    assert run(tmp_path, 'lego', servers=[bad, good]) == 0
    assert scene_of(tmp_path) == lego
    assert 'found no images in lego/test/' in capsys.readouterr().err


def test_a_damaged_archive_leaves_nothing_and_the_second_source_is_used(serve, tmp_path, lego):
    data = zip_of({'lego/aaa': b'a' * 5000} | prefixed('lego/', lego))
    damaged = data.replace(b'a' * 5000, b'b' * 5000)
    bad, good = serve({LEGO: damaged}), serve({LEGO: data})
    assert run(tmp_path, 'lego', servers=[bad]) == 2
    assert scene_of(tmp_path) is None and left_over(tmp_path) == []
    assert run(tmp_path, 'lego', servers=[bad, good]) == 0
    assert scene_of(tmp_path) == lego | {'aaa': b'a' * 5000}


@pytest.mark.parametrize('compression', [
    zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_any_damage_is_noticed(tmp_path, compression):
    """Random bytes of an archive change; it is refused, or its contents are as they were."""
    (scene,) = find_scenes(['lego'], tmp_path / 'data', [])
    files = {name: name.encode() * 20
             for name in (*scene.files, *(f'{group[0]}r_0.png' for group in scene.images))}
    data = zip_of(prefixed('lego/', files), compression)
    refused = 0
    for seed in range(150):
        chance, damaged = random.Random(seed), bytearray(data)
        for _ in range(chance.choice([1, 1, 3])):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        (tmp_path / 'lego.zip').write_bytes(damaged)
        try:
            unpack(tmp_path / 'lego.zip', scene)
            found = contents(scene.folder)
            assert set(found.values()) <= set(files.values()), seed
            shutil.rmtree(scene.folder)
        except Damaged:
            refused += 1
        assert not (tmp_path / 'data').exists() or list((tmp_path / 'data/nerf_synthetic').iterdir()) == []
    assert refused > 75


def test_a_damaged_archive_put_there_by_hand_is_named_and_kept(serve, tmp_path, lego, capsys):
    (tmp_path / 'downloads').mkdir()
    (tmp_path / 'downloads/lego.zip').write_bytes(b'half')
    assert run(tmp_path, 'lego', servers=[serve({LEGO: zip_of(prefixed('lego/', lego))})]) == 0
    assert scene_of(tmp_path) == lego and left_over(tmp_path) == ['lego.zip']
    assert f'{tmp_path}/downloads/lego.zip: not a zip file' in capsys.readouterr().err


# --- folders and disks --------------------------------------------------------------------------------------

def test_something_else_in_the_folder_is_not_touched(serve, tmp_path, lego, fern, capsys):
    server = serve({LEGO: zip_of(prefixed('lego/', lego)), FERN: zip_of(prefixed('fern/', fern))})
    (tmp_path / 'nerf_synthetic/lego').mkdir(parents=True)
    (tmp_path / 'nerf_synthetic/lego/notes.txt').write_text('mine')
    assert run(tmp_path, 'lego', 'fern', servers=[server]) == 2
    assert scene_of(tmp_path) == {'notes.txt': b'mine'} and scene_of(tmp_path, 'fern') == fern
    assert 'nerf_synthetic/lego: found a folder without transforms_train.json' in capsys.readouterr().err
    (tmp_path / 'nerf_synthetic/lego/notes.txt').unlink()
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego


def test_the_disk_is_checked_before_anything_is_stored(serve, tmp_path, lego, monkeypatch, capsys):
    data = zip_of(prefixed('lego/', lego))
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * len(data) - 1)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    server = serve({LEGO: data})
    assert run(tmp_path, 'lego', servers=[server]) == 2
    assert scene_of(tmp_path) is None and not list(tmp_path.rglob('*.part'))
    assert 'free disk space' in capsys.readouterr().err
    usage = usage._replace(free=2 * len(data))
    assert run(tmp_path, 'lego', servers=[server]) == 0


def test_the_disk_is_checked_before_unpacking(tmp_path, lego, monkeypatch, capsys):
    (tmp_path / 'downloads').mkdir()
    (tmp_path / 'downloads/lego.zip').write_bytes(zip_of(prefixed('lego/', lego)))
    size = sum(map(len, lego.values()))
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
    assert run(tmp_path, 'lego') == 2
    assert scene_of(tmp_path) is None and 'for lego unpacked' in capsys.readouterr().err
    usage = usage._replace(free=size)
    assert run(tmp_path, 'lego') == 0


def test_a_full_disk_is_named_and_the_download_continues_later(serve, tmp_path, lego):
    """A limit of the size of files stands for the full disk."""
    data = zip_of(prefixed('lego/', lego))
    server = serve({LEGO: data})
    process = start_tool(tmp_path, 'lego', servers=[server], preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (40000, resource.RLIM_INFINITY)))
    code, output = finish(process)
    assert code == 2 and 'Traceback' not in output and '.part: not written (File too large)' in output
    assert len(server.log) == 1
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == lego and server.log[1][1] == 'bytes=40000-'


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert run(tmp_path / 'file', 'lego') == 2
    assert capsys.readouterr().err.startswith(f'download.py: error: {tmp_path}/file/downloads: cannot create')


# --- kills --------------------------------------------------------------------------------------------------

def wait_until(condition, process):
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_download_continues(serve, tmp_path, lego, number):
    data = zip_of(prefixed('lego/', lego))
    server = serve({LEGO: data})
    server.pause = 0.2
    process = start_tool(tmp_path, 'lego', servers=[server])
    wait_until(lambda: any(path.stat().st_size >= 20000 for path in tmp_path.rglob('*.part')), process)
    process.send_signal(number)
    code, output = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 128 + number), output
    assert 'Traceback' not in output and scene_of(tmp_path) is None
    (part,) = tmp_path.rglob('*.part')
    assert part.read_bytes() == data[:part.stat().st_size]

    size, server.pause = part.stat().st_size, 0
    code, output = finish(start_tool(tmp_path, 'lego', servers=[server]))
    assert code == 0, output
    assert scene_of(tmp_path) == lego and left_over(tmp_path) == []
    assert server.log[-1] == [LEGO, f'bytes={size}-', len(data) - size]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_a_scene_that_is_half_unpacked_does_not_appear(serve, tmp_path, lego, number):
    many = lego | {f'train/{index}': b'' for index in range(8000)}
    server = serve({LEGO: zip_of(prefixed('lego/', many))})
    process = start_tool(tmp_path, 'lego', servers=[server])
    wait_until(lambda: list(tmp_path.glob('nerf_synthetic/.lego.part*/train')), process)
    process.send_signal(number)
    code, output = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 130), output
    assert scene_of(tmp_path) is None
    halves = list(tmp_path.glob('nerf_synthetic/.lego*'))
    assert len(halves) == (1 if number == signal.SIGKILL else 0)

    requests = len(server.log)
    assert run(tmp_path, 'lego', servers=[server]) == 0
    assert scene_of(tmp_path) == many and left_over(tmp_path) == []
    assert len(server.log) == requests  # it was complete
