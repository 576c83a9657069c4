"""A web server that shows a scene to browsers, each with its own camera.

Callbacks of viser come from its threads; they only note what the user wants. All rendering is done in the
thread that calls `work`. Importing this raises UserError if viser is not installed.
"""
import io
import threading
import time
import warnings
from collections import deque
from contextlib import redirect_stdout, suppress

import numpy as np

from scenes.errors import UserError

try:
    import viser
except ImportError:
    raise UserError('the viewer needs the package viser: pip install -r requirements-tools.txt') from None

from viewing.panel import Panel
from viewing.pictures import PictureRenderer
from viewing.session import Session

# The cameras of a scene span this many units of the viewer: its depths end at 167.
SPAN = 4.0
# A small picture, or a tile, takes about this long: ten a second, and time to send them.
UNIT_SECONDS = 0.07
# Pictures have at most this many rows.
MAX_ROWS = 720
# A direction this close to an axis (cosine) is taken for it.
ALMOST_AXIS = 0.9


class Viewer:
    """Shows a scene at http://host:port, or the next free port.

    Args:
      label: the name that the page shows.
      scene: a `Scene`.
      frames: the `FrameRenderer` of its networks; render_kwargs: its arguments of `render`.
      host, port: where to listen.
      folder: camera paths are saved here.
      unit_seconds: about how long one call of `work` may take.
      controls: called with each browser's `gui`, adds more to its panel; None for nothing.
    Attributes:
      address: of the page.
      status: a line that the panel shows.
    Raises:
      UserError: the address cannot be used.
    """

    def __init__(self, label, scene, frames, render_kwargs, host='127.0.0.1', port=8080, folder='.',
                 unit_seconds=UNIT_SECONDS, controls=None):
        self.scene, self.frames, self.folder, self.controls = scene, frames, folder, controls
        self.pictures = PictureRenderer(frames, render_kwargs, scene.poses, unit_seconds)
        self.scale, self.up, self.status = scale_of(scene.poses), up_of(scene.poses), ''
        # a browser may leave while its picture is on the way
        warnings.filterwarnings('ignore', message='Queued a .* on a closed connection', category=UserWarning)
        self.sessions, self.tasks, self.wake = {}, deque(), threading.Event()
        try:
            with redirect_stdout(io.StringIO()):  # it prints the address in a box
                self.server = viser.ViserServer(host, port, label=label, verbose=False)
        except OSError as error:
            raise UserError(f'--host, --port: cannot listen at {host}:{port} ({error.strerror})') from None
        self.address = f'http://{host}:{self.server.get_port()}'
        self.server.scene.set_up_direction(self.up)
        self.server.gui.configure_theme(control_width='large', show_logo=False, show_share_button=False)
        self.server.on_client_connect(self._connect)
        self.server.on_client_disconnect(self._disconnect)

    def _connect(self, client):
        session = Session(client, self.pictures, self.scale, MAX_ROWS)
        session.panel = Panel(self, session)
        client.camera.on_update(lambda camera: self.wake.set())
        self.sessions[client.client_id] = session
        self.wake.set()

    def _disconnect(self, client):
        self.sessions.pop(client.client_id, None)

    def call(self, task):
        """Let `work` run `task`, a generator, from one `yield` to the next: for whatever evaluates
        networks."""
        self.tasks.append(task)
        self.wake.set()

    def go_to(self, session, pose, camera):
        """Let a browser look through a `Camera` at `pose` [3, 4]."""
        session.go_to(pose, camera.fov)
        self.call(session.orbit_center(pose, camera))

    def work(self, timeout=0.0):
        """Do one thing that a browser waits for, for about `unit_seconds`. Returns whether there was anything
        to do within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            self.wake.clear()
            if self.tasks:
                task = self.tasks.popleft()
                with suppress(StopIteration):
                    next(task)
                    self.tasks.append(task)
                return True
            waits = [(wait, session) for session in list(self.sessions.values())
                     if (wait := session.due_in()) is not None]
            due = [session for wait, session in waits if wait <= 0]
            if due:  # new views before tiles, then whoever has waited longest
                min(due, key=lambda session: (session.wanted() == session.view, session.served_at)).advance()
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.wake.wait(min([left, *(wait for wait, _ in waits)]))

    def networks_changed(self, complete_only=False):
        """Render pictures again, because the networks have changed: all, or those that are complete."""
        for session in list(self.sessions.values()):
            if session.complete or not complete_only:
                session.networks_changed()
        self.wake.set()

    def show_status(self, text):
        """Show a line in all panels."""
        self.status = text
        for session in list(self.sessions.values()):
            session.panel.status.content = text

    def close(self):
        """Stop the server; browsers say that the connection is lost."""
        with redirect_stdout(io.StringIO()):
            self.server.stop()


def scale_of(poses):
    """Units of the viewer in a unit of the scene, for cameras at `poses` [N, 3, 4]."""
    extent = np.ptp(poses[:, :, 3], axis=0).max()
    return float(SPAN / extent) if extent > 0 else 1.0


def up_of(poses):
    """The unit vector that is up in the photos at `poses` [N, 3, 4], on average; an axis if it is close to
    one."""
    up = poses[:, :, 1].mean(0)
    up = up / max(np.linalg.norm(up), 1e-9)
    axis = np.abs(up).argmax()
    if abs(up[axis]) >= ALMOST_AXIS:
        up = np.sign(up[axis]) * np.eye(3)[axis]
    return tuple(up.tolist())
