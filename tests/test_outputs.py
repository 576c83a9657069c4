"""Frame folders, videos and encoders, and what the Evaluator makes of them."""
import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from accel.network_query import NetworkQuery
from accel.renderer import Renderer
from run_nerf import EXACT, ImageRenderer, create_nerf, render_frame, render_path
from run_nerf_helpers import to8b
from scenes.cameras import Camera
from scenes.errors import UserError
from training import outputs
from training.evaluation import Evaluator
from training.frames import FrameRenderer
from training.options import config_parser
from training.outputs import (
    ENCODERS,
    SINGLE_FRAMES,
    Frame,
    FrameFolder,
    code_version,
    frames_fingerprint,
    is_complete_video,
    open_video,
    probe_encoder,
    video_path,
)
from training.signals import Stopped, StopRequest

# Intrinsics of 12 pixels focal length, and the size of the images.
K = np.array([[12.0, 0, 5.0], [0, 12.0, 4.0], [0, 0, 1]])
HWF = [8, 10, 12.0]
NETWORKS = ['--expname', 'run', '--no_reload', '--device', 'cpu', '--dataset_type', 'blender',
            '--use_viewdirs', '--netdepth', '3', '--netwidth', '16', '--netdepth_fine', '3',
            '--netwidth_fine', '16', '--N_samples', '6', '--N_importance', '5']


def small_networks(**options):
    """Arguments of `render` with two small networks, the same at each call."""
    torch.manual_seed(3)
    return {**create_nerf(config_parser().parse_args(NETWORKS))[1], 'near': 2.0, 'far': 6.0, **options}


def some_frame(seed=0, height=8, width=10):
    """A random frame with some empty pixels, nowhere closer than 0.5 or farther than 5."""
    numbers = np.random.RandomState(seed)
    disp = numbers.uniform(0.2, 2.0, (height, width)).astype(np.float32)
    disp[:2] = 0
    rgb = numbers.rand(height, width, 3).astype(np.float32)
    return Frame(rgb, disp, (disp > 0).astype(np.float32), seconds=0.1)


def camera_path(count):
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, 2, 3] = np.linspace(3, 4, count)
    return poses


# --- frames -------------------------------------------------------------------------------------------------

def test_the_chunk_is_halved_when_memory_runs_out():
    chunks = []

    class OnASmallGPU(ImageRenderer):
        def render_frame(self, pose, hwf, K, chunk, *others):
            chunks.append(chunk)
            if chunk > 400:
                raise torch.OutOfMemoryError('CUDA out of memory')
            return render_frame(pose, hwf, K, chunk, *others)
    hwf = [40, 50, 60.0]
    expected = render_frame(np.eye(4), hwf, K, 2000, small_networks())
    with pytest.warns(UserWarning, match='out of GPU memory'):
        frame, _ = OnASmallGPU(hwf, K, 4000, small_networks()).render_path(np.tile(np.eye(4), (2, 1, 1)))
    assert chunks == [2000, 1000, 500, 250, 250]
    np.testing.assert_allclose(frame.rgb, expected.rgb, atol=1e-6)


def test_rendering_fails_if_the_smallest_chunk_needs_too_much_memory():
    class OnNoGPU(FrameRenderer):
        def render_frame(self, *_):
            raise torch.OutOfMemoryError('CUDA out of memory')
    with pytest.raises(torch.OutOfMemoryError):
        OnNoGPU(HWF, K, 100, small_networks()).render_view(np.eye(4))


def test_a_signal_interrupts_a_frame():
    class Endless(FrameRenderer):
        def render_frame(self, *_):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError('not interrupted')
    with StopRequest(str) as stop:
        frames = Endless(HWF, K, 100, small_networks(), stop=stop)
        for _ in range(2):  # the second one is not begun
            with pytest.raises(Stopped):
                frames.render(np.eye(4))


# --- frame folders ------------------------------------------------------------------------------------------

@pytest.fixture
def rendered(monkeypatch):
    """The indices of the frames that are rendered and saved rather than reused."""
    indices, save = [], FrameFolder.save

    def save_and_count(self, index, frame):
        indices.append(index)
        save(self, index, frame)
    monkeypatch.setattr(FrameFolder, 'save', save_and_count)
    return indices


def test_an_interrupted_path_resumes_with_the_missing_frames(tmp_path, rendered):
    poses, kwargs = camera_path(5), small_networks()
    whole, disps = render_path(poses, HWF, K, 64, kwargs, savedir=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.png')}
    for name in ('001.png', '003.png'):
        (tmp_path / name).unlink()
    rendered.clear()
    again, disps_again = render_path(poses, HWF, K, 64, kwargs, savedir=tmp_path)
    assert rendered == [1, 3]
    np.testing.assert_allclose(again, whole, atol=1 / 255)
    np.testing.assert_allclose(disps_again, disps, atol=1e-3)
    assert {path.name: path.read_bytes() for path in tmp_path.glob('*.png')} == before
    rendered.clear()
    # other settings: nothing is reused
    render_path(poses, HWF, K, 64, small_networks(white_bkgd=True), savedir=tmp_path)
    assert rendered == [0, 1, 2, 3, 4]


def test_frames_of_another_path_are_removed(tmp_path):
    poses, kwargs = camera_path(3), small_networks()
    render_path(poses, HWF, K, 64, kwargs, savedir=tmp_path)
    render_path(poses[:2] + 0.1, HWF, K, 64, kwargs, savedir=tmp_path)
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['000.png', '001.png']


def test_depth_images_hold_the_depth(tmp_path):
    frame = some_frame()
    FrameFolder(tmp_path, 'fingerprint', far=6.0).save(0, frame)
    grey = iio.imread(tmp_path / 'depth/000.png')
    assert grey.dtype == np.uint16
    depth = np.where(frame.disp > 0, 1 / np.maximum(frame.disp, 1e-10), 0)
    np.testing.assert_allclose(grey * (6.0 / 65535), depth, atol=1e-4)
    assert f'{6.0 / 65535:.9g}' in json.loads((tmp_path / 'frames.json').read_text())['depth']


def test_a_frame_is_loaded_as_it_was_saved(tmp_path):
    frame = some_frame()
    FrameFolder(tmp_path, 'fingerprint', far=6.0).save(0, frame)
    loaded = FrameFolder(tmp_path, 'fingerprint', far=6.0).load(0)
    assert np.array_equal(to8b(loaded.rgb), to8b(frame.rgb)) and loaded.seconds is None
    np.testing.assert_allclose(loaded.disp, frame.disp, atol=1e-3)
    assert np.array_equal(loaded.acc, frame.acc)


def test_frames_are_reused_only_with_the_same_fingerprint(tmp_path):
    store = FrameFolder(tmp_path, 'one', far=6.0)
    assert store.reused == 0
    for index in range(3):
        store.save(index, some_frame(index))
    assert FrameFolder(tmp_path, 'one', far=6.0).reused == 3
    store = FrameFolder(tmp_path, 'one', far=6.0, overwrite=True)
    assert store.reused == 0 and store.load(0) is None and not list(tmp_path.rglob('*.png'))
    store.save(0, some_frame())
    store = FrameFolder(tmp_path, 'other', far=6.0)
    assert store.reused == 0 and not list(tmp_path.rglob('*.png'))


def test_files_of_others_are_left_alone(tmp_path):
    names = ['2023_holiday.png', '0001.png', 'metrics.csv', 'video.mov']
    for name in names:
        (tmp_path / name).write_text('not ours')
    store = FrameFolder(tmp_path, 'one', far=6.0)
    assert store.reused == 0 and all((tmp_path / name).read_text() == 'not ours' for name in names)


def test_metrics_and_videos_of_other_frames_are_removed(tmp_path):
    FrameFolder(tmp_path, 'one', far=6.0).save(0, some_frame())
    names = ['metrics.json', 'metrics.csv', 'video.mp4', 'video_disp.mp4']
    for name in names:
        (tmp_path / name).write_text('old')
    FrameFolder(tmp_path, 'one', far=6.0)
    assert all((tmp_path / name).is_file() for name in names)
    FrameFolder(tmp_path, 'other', far=6.0)
    assert not any((tmp_path / name).exists() for name in names)


@pytest.mark.parametrize('name', ['000.png', 'depth/000.png'])
def test_a_damaged_frame_is_not_loaded(tmp_path, name):
    store = FrameFolder(tmp_path, 'fingerprint', far=6.0)
    store.save(0, some_frame())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    assert FrameFolder(tmp_path, 'fingerprint', far=6.0).load(0) is None


def test_the_fingerprint_depends_on_everything_that_frames_depend_on(tmp_path, monkeypatch):
    weights = {'weight': torch.arange(6.0).reshape(2, 3), 'occupied': torch.tensor([True, False])}

    def fingerprint(poses=camera_path(2), hwf=HWF, K=K, weights=weights, **settings):  # noqa: B008 - read only
        return frames_fingerprint(poses, hwf, K, {'network_fn': weights},
                                  {'near': 2.0, 'ndc': False, **settings})
    same, equal_weights = fingerprint(), {key: tensor.clone() for key, tensor in weights.items()}
    assert same == fingerprint() == fingerprint(near=np.float32(2.0), weights=equal_weights)
    others = [fingerprint(camera_path(3)), fingerprint(hwf=[8, 10, 13.0]), fingerprint(K=K + 1e-6),
              fingerprint(near=2.1), fingerprint(near=None), fingerprint(ndc=True),
              fingerprint(precision='bf16'), fingerprint(weights={}),
              fingerprint(weights={**weights, 'weight': weights['weight'].T}),
              fingerprint(weights={**weights, 'weight': weights['weight'] + 1e-3}),
              fingerprint(weights={**weights, 'occupied': torch.tensor([True, True])})]
    assert len({same, *others}) == 1 + len(others)


def test_the_version_of_the_code_depends_on_all_source_files(tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, 'ROOT', tmp_path)
    for folder in ('accel/kernels', 'scenes', 'training'):
        (tmp_path / folder).mkdir(parents=True)
    found = [code_version()]
    for name in ('run_nerf.py', 'accel/kernels/hash_grid.c', 'scenes/bounds.py', 'training/outputs.py'):
        for content in ('one', 'two'):
            (tmp_path / name).write_text(content)
            found.append(code_version())
    (tmp_path / 'README.md').write_text('no code')
    assert len(set(found)) == 9 and code_version() == found[-1]


class OtherRenderer(Renderer):
    pass


def test_what_frames_of_a_renderer_depend_on(monkeypatch):
    def fingerprint(render_factor=0, settings=None, **options):
        kwargs = small_networks(**{'network_query_fn': NetworkQuery(64), 'renderer': EXACT, **options})
        return ImageRenderer(HWF, K, 64, kwargs, render_factor, settings=settings).fingerprint(camera_path(2))
    same = fingerprint()
    assert same == fingerprint(network_query_fn=NetworkQuery(1000))
    settings = {'near': None, 'far': None}
    others = [fingerprint(render_factor=2), fingerprint(near=2.5), fingerprint(far=7.0),
              fingerprint(white_bkgd=True), fingerprint(network_query_fn=NetworkQuery(64, 'bf16')),
              fingerprint(renderer=OtherRenderer()), fingerprint(settings={'precision': 'fp32'}),
              fingerprint(settings=settings, near=2.6), fingerprint(settings=settings, near=2.7)]
    assert len({same, *others}) == 1 + len(others)
    monkeypatch.setattr('training.frames.code_version', lambda: 'edited')
    assert fingerprint() != same


# --- videos -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('refused, expected', [('libx264', 'MPEG-4'), ('', 'GIF')])
def test_without_h264_another_encoder_is_found(tmp_path, monkeypatch, refused, expected):
    """An ffmpeg that refuses a codec, and one that refuses everything."""
    fake = tmp_path / 'ffmpeg'
    fake.write_text(f'#!/bin/sh\ncase "$*" in *"{refused}"*) exit 1;; esac\n'
                    f'exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', str(fake))
    encoder = probe_encoder()
    assert encoder.name == expected
    with open_video(tmp_path / 'video', encoder) as add:
        for shade in np.linspace(0, 1, 5):
            add(np.full((33, 47, 3), shade))
    assert video_path(tmp_path / 'video', encoder).stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['ffmpeg', f'video{encoder.suffix}']


def test_single_frames_where_nothing_encodes(tmp_path, monkeypatch):
    monkeypatch.setattr('imageio.get_writer', None)
    assert probe_encoder() == SINGLE_FRAMES
    with open_video(tmp_path / 'video', SINGLE_FRAMES) as add:
        add(np.zeros((4, 4, 3)))
    assert [path.name for path in (tmp_path / 'video').iterdir()] == ['000.png']


@pytest.mark.parametrize('encoder', ENCODERS, ids=lambda encoder: encoder.name)
def test_an_abandoned_video_leaves_nothing(tmp_path, encoder):
    with pytest.raises(KeyError), open_video(tmp_path / 'video', encoder) as add:
        add(np.zeros((16, 16, 3)))
        raise KeyError
    assert list(tmp_path.iterdir()) == []


class Interrupted(BaseException):
    """Raised by a signal handler."""


def interrupt(*_):
    raise Interrupted


@pytest.mark.parametrize('encoder', ENCODERS[:3], ids=lambda encoder: encoder.name)
def test_a_signal_at_any_moment_leaves_the_whole_video_or_nothing(tmp_path, encoder):
    """While the encoder is started, fed or waited for: it has ended before the temporary file is removed."""
    previous, moments = signal.signal(signal.SIGINT, interrupt), random.Random(0)
    try:
        for attempt in range(20):
            folder = tmp_path / f'{attempt}'
            folder.mkdir()
            timer = threading.Timer(moments.uniform(0, 0.3), os.kill, [os.getpid(), signal.SIGINT])
            timer.start()
            with contextlib.suppress(Interrupted):
                with open_video(folder / 'video', encoder) as add:
                    for shade in np.linspace(0, 1, 20):
                        add(np.full((64, 64, 3), shade))
                signal.pause()
            timer.join()
    finally:
        signal.signal(signal.SIGINT, previous)
    time.sleep(0.3)  # an encoder that is still running would write in this time
    found = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert {path.name for path in found} <= {f'video{encoder.suffix}'}
    assert all(is_complete_video(path, 20) for path in found if encoder.codec)
    assert all(len(iio.imread(path)) == 20 for path in found if not encoder.codec)


# --- the Evaluator ------------------------------------------------------------------------------------------

class Frames:
    """Stands for a FrameRenderer: random frames of 12×12 pixels; one that is in `store` is reused."""
    device = torch.device('cpu')

    def __init__(self):
        self.calls = []

    def render_path(self, poses, store=None, cameras=None):
        self.calls.append(len(poses))
        for index in range(len(poses)):
            frame = store and store.load(index)
            if frame is None:
                frame = some_frame(index, 12, 12)
                if store:
                    store.save(index, frame)
            yield frame

    def render_view(self, pose, stride, camera):
        self.calls.append('view')
        return some_frame(0, 12 // stride, 12 // stride)

    def serve(self):
        self.calls.append('serve')

    def drop_cache(self):
        pass

    def fingerprint(self, poses, cameras=None):
        return 'fingerprint'


class Processes:
    def __init__(self, is_main=True):
        self.is_main, self.released = is_main, 0

    def release(self):
        self.released += 1


class Logger:
    def __init__(self, folder):
        self.folder, self.values, self.written = folder, {}, {}

    def scalars(self, step, values):
        self.values.update(values)

    def image(self, step, name, image):
        self.values[name] = image.shape

    def record_output(self, what, path):
        self.written[what] = path


def evaluator(tmp_path, is_main=True, **options):
    """An Evaluator with stand-ins around it, and a list of the lines that it says."""
    args = SimpleNamespace(i_img=2, i_testset=3, i_video=4, N_rand=1024, seed=0, white_bkgd=True,
                           appearance=False, refine_poses=False, overwrite=False, render_only=False,
                           render_test=False, render_factor=0, basedir=str(tmp_path), expname='name')
    vars(args).update(options)
    poses = camera_path(5).astype(np.float32)
    scene = SimpleNamespace(far=6.0, poses=poses, render_poses=poses[:3], fps=30,
                            path_cameras=[Camera(12, 12, np.eye(3))] * 3,
                            images=np.zeros((5, 12, 12, 3), np.uint8), names=[f'r_{i}.png' for i in range(5)],
                            i_train=[0, 1], i_val=[2], i_test=np.array([3, 4]), masks=None,
                            cameras=[Camera(12, 12, np.eye(3))] * 5)
    lines = []
    return Evaluator(args, scene, Frames(), Processes(is_main), lines.append), lines


@pytest.mark.parametrize('step, calls', [(1, []), (2, ['view']), (3, [2]), (4, ['view', 3]),
                                         (12, ['view', 2, 3])])
def test_outputs_are_made_at_their_intervals(tmp_path, step, calls):
    main, _ = evaluator(tmp_path)
    logger = Logger(tmp_path)
    main.run_if_due(step, logger)
    assert main.frames.calls == calls and main.processes.released == bool(calls)
    other, _ = evaluator(tmp_path, is_main=False)
    other.run_if_due(step, None)
    assert other.frames.calls == ['serve'] * bool(calls) and other.processes.released == 0
    assert (tmp_path / f'testset_{step:06d}/metrics.json').is_file() == (step % 3 == 0)
    assert ('test/psnr' in logger.values) == (step % 3 == 0)
    assert ('psnr/held-out coarse' in logger.values) == (step % 2 == 0)
    assert ('video' in logger.written) == (step % 4 == 0)


def test_only_missing_files_are_written_after_a_resume(tmp_path):
    main, _ = evaluator(tmp_path)
    main.run_missing(12, Logger(tmp_path))
    assert main.frames.calls == [2, 3]
    main.run_missing(12, Logger(tmp_path))
    assert main.frames.calls == [2, 3] and main.processes.released == 2
    other, _ = evaluator(tmp_path, is_main=False)
    other.run_missing(12, None)
    other.run_missing(2, None)  # only the held-out view is due, which leaves no file
    assert other.frames.calls == ['serve']


def test_an_output_that_fails_is_reported(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('training.outputs.write_image', fail)
    main, lines = evaluator(tmp_path)
    main.run_if_due(3, Logger(tmp_path))
    assert 'No space left on device); training continues' in lines[-1] and 'testset_000003' in lines[-1]
    assert main.processes.released == 1


def test_the_other_processes_are_released_whatever_ends_rank_0(tmp_path, monkeypatch):
    main, _ = evaluator(tmp_path)
    monkeypatch.setattr(main.frames, 'render_view', interrupt)
    with pytest.raises(Interrupted):
        main.run_if_due(2, Logger(tmp_path))
    assert main.processes.released == 1


def test_a_signal_ends_evaluation_but_not_the_run(tmp_path, monkeypatch):
    def stop(*_):
        raise Stopped(143)
    main, _ = evaluator(tmp_path)
    monkeypatch.setattr(main.frames, 'render_path', stop)
    main.run_if_due(12, Logger(tmp_path))
    main.run_missing(12, Logger(tmp_path))
    assert main.processes.released == 2 and not list(tmp_path.glob('*.mp4'))


def test_a_scene_without_test_views(tmp_path):
    main, _ = evaluator(tmp_path)
    main.scene.i_test = np.arange(0)
    main.run_if_due(3, Logger(tmp_path))
    assert main.frames.calls == []
    main.args.render_test = main.args.render_only = True
    main.args.datadir = 'scene'
    with pytest.raises(UserError, match='scene: found no test views'):
        main.render_only(7)


@pytest.mark.parametrize('options', [{'render_test': True}, {'render_test': False}])
def test_render_only_names_the_frames_that_it_reuses(tmp_path, rendered, options):
    views = 2 if options['render_test'] else 3
    for overwrite, count in [(False, 0), (False, views), (True, 0)]:
        main, lines = evaluator(tmp_path, render_only=True, overwrite=overwrite, **options)
        rendered.clear()
        main.render_only(7)
        said = [line for line in lines if 'reusing' in line]
        assert len(said) == bool(count) and bool(rendered) == (not count)
        if count:
            assert f'reusing {count} frames' in said[0] and '--overwrite' in said[0]
            assert 'renderonly_' in said[0]
    folder = next(Path(tmp_path, 'name').iterdir())
    assert (folder / 'video.mp4').is_file() and (folder / 'video_disp.mp4').is_file()
    if options['render_test']:
        content = json.loads((folder / 'metrics.json').read_text())
        assert [(row['view'], row['image']) for row in content['images']] == [(3, 'r_3.png'), (4, 'r_4.png')]
