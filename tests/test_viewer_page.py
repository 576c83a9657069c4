"""The viewer's page in a real browser."""
import io
import re
import shutil
import signal
import threading
import time
from contextlib import contextmanager

import imageio.v3 as iio
import numpy as np
import pytest
from tiny_browser import open_browser
from tiny_runs import FAST_DEMO, NO_OUTPUTS, ROOT, finish, run, start

from run_nerf_helpers import to8b
from scenes.paths import read_camera_path
from tools.trained import load_trained
from training.metrics import psnr

pytest.importorskip('viser', reason='viser is not installed')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore::DeprecationWarning')]

# The window; the panel covers its right side.
WIDTH, HEIGHT, FREE = 900, 400, 480


@pytest.fixture(scope='module')
def trained_run(tmp_path_factory):
    """The folder of a short run with two checkpoints."""
    folder = tmp_path_factory.mktemp('logs')
    assert run(*FAST_DEMO, *NO_OUTPUTS, '--N_iters', 60, '--i_weights', 30, '--basedir', folder) == 0
    return folder / 'demo_fast'


@contextmanager
def serving(viewer):
    """Let a viewer work in a thread."""
    done = threading.Event()

    def work():
        while not done.is_set():
            viewer.work(0.1)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield viewer
    finally:
        done.set()
        thread.join()
        viewer.close()


@pytest.fixture(scope='module')
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def viewer(trained_run):
    from viewing.viewer import Viewer
    trained = load_trained(trained_run)
    with serving(Viewer('demo', trained.scene, trained.frames, trained.frames.render_kwargs)) as viewer:
        yield viewer


def wait_until(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, 'waited too long'
        time.sleep(0.05)


@contextmanager
def open_page(browser, viewer):
    """A new page and its `Session`, with the full picture of the first view."""
    before = set(viewer.sessions)
    page = browser.new_page(viewport={'width': WIDTH, 'height': HEIGHT})
    page.goto(f'{viewer.address}/?fixedDpr=1')
    wait_until(lambda: set(viewer.sessions) - before)
    (new,) = set(viewer.sessions) - before
    session = viewer.sessions[new]
    page.locator('.mantine-Notification-closeButton').click()  # it warns of software WebGL
    wait_until(lambda: session.due_in() is None)
    try:
        yield page, session
    finally:
        page.close()


def screenshot(page):
    """The part of the window beside the panel."""
    page.wait_for_timeout(1500)  # a software renderer draws some frames a second
    return iio.imread(io.BytesIO(page.screenshot()))[:, :FREE, :3]


def expected(viewer, session):
    """The same part of the picture that `render` gives for the camera of the session."""
    view, kwargs = session.wanted(), viewer.frames.render_kwargs
    frame = viewer.frames.render(view.pose(), camera=view.camera())
    assert kwargs['white_bkgd'] and frame.rgb.shape == (HEIGHT, WIDTH, 3)
    return to8b(frame.rgb)[:, :FREE]


def drag(page, steps=10, seconds=1.0):
    """Turn the camera with the mouse, in several moves."""
    page.mouse.move(200, 200)
    page.mouse.down()
    for step in range(1, steps + 1):
        page.mouse.move(200 + 12 * step, 200 + 4 * step)
        page.wait_for_timeout(1000 * seconds / steps)
    page.mouse.up()


def test_the_picture_after_a_move_is_what_render_gives(browser, viewer):
    with open_page(browser, viewer) as (page, session):
        first = session.view
        drag(page)
        wait_until(lambda: session.view != first and session.due_in() is None)
        assert psnr(screenshot(page), expected(viewer, session)) >= 35


def test_ten_moves_in_a_second_leave_no_stale_picture(browser, viewer):
    with open_page(browser, viewer) as (page, session):
        sent = []
        send = session.send
        session.send = lambda quality: (sent.append(session.view), send(quality))
        drag(page, steps=10, seconds=1.0)
        wait_until(lambda: session.due_in() is None)
        assert len(set(sent)) > 2 and sent[-1] == session.wanted()
        assert psnr(screenshot(page), expected(viewer, session)) >= 35


def test_browsers_have_their_own_cameras_and_may_leave(browser, viewer):
    with open_page(browser, viewer) as (page, session), open_page(browser, viewer) as (other_page, other):
        view = other.view
        drag(page)
        wait_until(lambda: session.view != view and session.due_in() is None)
        assert other.view == view
        assert psnr(screenshot(other_page), expected(viewer, other)) >= 35
        with open_browser(browser) as doomed:
            lost = doomed.new_page()
            lost.goto(viewer.address)
            wait_until(lambda: len(viewer.sessions) == 3)
        wait_until(lambda: len(viewer.sessions) == 2)
        drag(other_page)
        wait_until(lambda: other.view != view and other.due_in() is None)
        assert psnr(screenshot(other_page), expected(viewer, other)) >= 35


def test_a_port_in_use_is_passed_over(viewer):
    from viewing.viewer import Viewer
    port = int(viewer.address.rpartition(':')[2])
    other = Viewer('other', viewer.scene, viewer.frames, viewer.frames.render_kwargs, port=port)
    assert other.address != viewer.address
    other.close()


def test_what_the_panel_chooses_is_shown(browser, viewer):
    with open_page(browser, viewer) as (page, session):
        colors = screenshot(page)
        for kind in ('disparity', 'normals'):
            page.get_by_label('show', exact=True).click()
            page.get_by_role('option', name=kind).click()
            wait_until(lambda kind=kind: session.view.look.kind == kind and session.due_in() is None)
            picture = screenshot(page)
            assert psnr(picture, colors) < 25 and picture.std() > 5, kind


def test_a_photo_is_compared(browser, viewer):
    with open_page(browser, viewer) as (page, session):
        view = int(viewer.scene.i_test[-1])
        page.get_by_role('tab', name='Photos').click()
        page.get_by_label('photo', exact=True).click()
        page.get_by_role('option', name=session.panel.photos.name_of(view), exact=True).click()
        page.get_by_role('button', name='go there and compare').click()
        page.get_by_text(re.compile(r': \d+\.\d+ dB')).wait_for()
        camera = viewer.scene.cameras[view]
        frame = viewer.frames.render(viewer.scene.poses[view], camera=camera)
        true = psnr(to8b(frame.rgb), viewer.scene.images[view])
        said = session.panel.photos.compared.content.split(': ')[-1].removesuffix(' dB')
        assert abs(float(said) - true) < 0.1
        np.testing.assert_allclose(session.wanted().pose(), viewer.scene.poses[view], atol=1e-4)


def test_the_ray_microscope_explains_the_pixel_that_is_clicked(browser, viewer):
    with open_page(browser, viewer) as (page, session):
        page.get_by_role('tab', name='Ray').click()
        page.get_by_label('ray microscope').check()
        wait_until(lambda: session.due_in() is None)
        page.wait_for_timeout(500)
        page.mouse.click(400, 220)
        wait_until(lambda: session.panel.ray.steps)
        page.get_by_text(f'pixel (400, 220), step {len(session.panel.ray.steps)}').wait_for()
        color, acc = session.panel.ray.steps[-1].samples.color()
        rendered = viewer.frames.render(session.view.pose(), camera=session.view.camera())
        assert acc > 0.5
        np.testing.assert_allclose(color + 1 - acc, rendered.rgb[220, 400], atol=0.02)
        page.get_by_text('density σ').wait_for()
        page.get_by_role('button', name='download all numbers').wait_for()


def test_a_path_is_saved_and_rendered(browser, viewer, tmp_path):
    with open_page(browser, viewer) as (page, session):
        page.get_by_role('tab', name='Path').click()
        page.get_by_role('button', name='save').click()
        page.get_by_text('found 0 keyframes, expected at least 2').wait_for()
        page.get_by_role('button', name='add keyframe').click()
        page.get_by_text('1 keyframes').wait_for()
        first = session.view
        drag(page)
        wait_until(lambda: session.view != first and session.due_in() is None)
        page.get_by_role('button', name='add keyframe').click()
        page.get_by_text('2 keyframes').wait_for()
        page.get_by_label('seconds', exact=True).fill('1')
        page.locator('input[value*=camera_path]').fill(str(tmp_path / 'path.json'))
        page.wait_for_timeout(500)
        page.get_by_role('button', name='save').click()
        page.get_by_text('Saved').wait_for()
        path = read_camera_path(tmp_path / 'path.json')
        assert len(path.poses) == 30
        np.testing.assert_allclose(path.poses[0], first.pose(), atol=1e-4)
        np.testing.assert_allclose(path.poses[-1], session.view.pose(), atol=1e-4)


def address_of(process):
    """The address that a process prints."""
    for line in process.stdout:
        match = re.search(r'http://127\.0\.0\.1:\d+', line)
        if match:
            return match[0]
    raise AssertionError('it has ended')


def test_a_checkpoint_is_replaced_while_it_is_viewed(browser, trained_run, tmp_path):
    folder = tmp_path / 'demo_fast'
    folder.mkdir()
    shutil.copy(trained_run / '000030.tar', folder)
    process = start(folder, '--port', 8765, script=ROOT / 'tools/view.py')
    page = browser.new_page()
    page.goto(address_of(process))
    page.get_by_text('step 30').wait_for()
    whole = (trained_run / '000060.tar').read_bytes()
    (folder / '000060.tar').write_bytes(whole[:1000])  # as if it were still being copied
    assert any('not a readable checkpoint' in line for line in process.stdout)
    (folder / '000060.tar').write_bytes(whole)
    page.get_by_text('step 60').wait_for()
    page.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_run_is_paused_and_survives_its_browser(browser, tmp_path):
    process = start(*FAST_DEMO, *NO_OUTPUTS, '--N_iters', 10 ** 6, '--i_weights', 10 ** 6, '--basedir',
                    tmp_path, '--viewer', '--viewer_port', 8766)
    log = tmp_path / 'demo_fast/log.txt'
    with open_browser(browser) as own:
        page = own.new_page()
        page.goto(address_of(process))
        page.get_by_text(re.compile('the viewer takes [0-9]+% of the time')).wait_for()
        page.get_by_role('button', name='pause').click()
        page.get_by_role('button', name='continue').wait_for()
        page.wait_for_timeout(1000)
        lines = log.read_text()
        page.wait_for_timeout(3000)
        assert log.read_text() == lines
    wait_until(lambda: log.read_text() != lines)  # it goes on when nobody watches
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert 'Traceback' not in output
    assert len(list(log.parent.glob('*.tar'))) == 1
