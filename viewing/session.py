"""One browser: what it looks at, and the picture that it is shown."""
import time
from typing import NamedTuple

import numpy as np
from viser.transforms import SO3

from run_nerf_helpers import to8b
from scenes.cameras import camera_of_fov
from training.outputs import disparity_range
from viewing.pictures import Look, draw

# After a camera has stood still for this long, its full picture is rendered.
SETTLE_SECONDS = 0.2
# While the picture is refined, it is sent again after this long.
RESEND_SECONDS = 0.25
# Quality of JPEG images while the camera moves, and of the full picture.
MOVING_QUALITY, STILL_QUALITY = 70, 95
# From OpenGL's camera axes to those of the viewer (OpenCV's), and back.
FLIP = np.diag([1.0, -1, -1])


class View(NamedTuple):
    """A camera and what its picture shows; equal views have equal pictures."""
    c2w: tuple      # 12 numbers [3, 4], in the scene's coordinates
    fov: float      # vertical field of view in degrees
    width: int      # of the full picture, in pixels
    height: int
    look: Look

    def pose(self):
        """c2w [3, 4]."""
        return np.reshape(self.c2w, (3, 4))

    def camera(self):
        """The `Camera` of the full picture."""
        return camera_of_fov(self.fov, self.height, self.width)


class Session:
    """Keeps the picture of one browser up to date, a little at a time.

    Args:
      client: viser's handle of the browser.
      pictures: a `PictureRenderer`.
      scale: units of the viewer in a unit of the scene.
      max_rows: most rows of a picture.
    Attributes:
      look: a `Look`: what the user has chosen.
      view: the `View` whose picture is shown, None before the first one.
      complete: whether the full picture of it is shown.
      hides_markers: whether the scene hides cameras and points that are behind it.
      panel: the `Panel` of the browser.
      size: width and height of the picture that is shown.
    """

    def __init__(self, client, pictures, scale, max_rows):
        self.client, self.pictures, self.scale, self.max_rows = client, pictures, scale, max_rows
        self.look, self.view, self.complete, self.size = Look(), None, False, (0, 0)
        self.hides_markers = True
        self.moved_at = self.served_at = self.sent_at = 0.0
        self.maps = self.parts = self.disparities = self.panel = None

    def wanted(self):
        """The `View` that the browser should show."""
        camera = self.client.camera
        c2w = self.pose_of(camera)
        rows = max(1, min(self.max_rows, camera.image_height))
        columns = max(1, round(rows * camera.image_width / max(camera.image_height, 1)))
        return View(tuple(c2w.ravel().tolist()), float(np.degrees(camera.fov)), columns, rows, self.look)

    def placed(self, pose):
        """Orientation wxyz and position of a pose [3, 4] in the viewer."""
        return SO3.from_matrix(pose[:, :3] @ FLIP).wxyz, self.scale * pose[:, 3]

    def pose_of(self, thing):
        """The pose [3, 4] of something in the viewer that has wxyz and position; the inverse of `placed`."""
        return np.column_stack([SO3(thing.wxyz).as_matrix() @ FLIP, np.asarray(thing.position) / self.scale])

    def go_to(self, pose, fov):
        """Move the camera to a pose [3, 4], with a vertical field of view in degrees."""
        with self.client.atomic():
            self.client.camera.wxyz, self.client.camera.position = self.placed(pose)
            self.client.camera.fov = np.radians(fov)

    def orbit_center(self, pose, camera):
        """Let the mouse turn the camera about what a `Camera` at `pose` sees in its middle; a task for
        `Viewer.call`."""
        rows, columns = (slice(3 * size // 8, 5 * size // 8, max(1, size // 32))
                         for size in (camera.H, camera.W))
        depth = self.pictures.maps(self.pictures.rays(pose, camera)[:, rows, columns], Look()).depth
        if np.isfinite(depth).any():
            distance = np.median(depth[np.isfinite(depth)])
            self.client.camera.look_at = self.scale * (pose[:, 3] - distance * pose[:, 2])
        yield

    def due_in(self):
        """Seconds until there is something to render; None if the picture is complete."""
        if self.wanted() != self.view:
            return 0.0
        if self.complete:
            return None
        return max(0.0, self.moved_at + SETTLE_SECONDS - time.monotonic())

    def resend(self):
        """Send the picture again; a task for `Viewer.call`."""
        if self.maps is not None:
            self.send(STILL_QUALITY)
        yield

    def networks_changed(self):
        """Render the picture again, because the networks have changed."""
        self.complete, self.parts = False, None

    def advance(self):
        """Render the small picture of a new view, or another tile of the full one, and send it."""
        view, self.served_at = self.wanted(), time.monotonic()
        if view != self.view:
            self.view, self.complete, self.parts, self.moved_at = view, False, None, self.served_at
            self.maps = self.pictures.small(view.pose(), view.camera(), view.look)
            self.disparities = disparity_range(1 / self.maps.depth)
            self.complete = self.maps.acc.shape == (view.height, view.width)
            self.send(STILL_QUALITY if self.complete else MOVING_QUALITY)
            return
        if self.parts is None:
            self.parts = self.pictures.refine(self.maps, view.pose(), view.camera(), view.look)
        maps = next(self.parts, None)
        self.complete, self.maps = maps is None, self.maps if maps is None else maps
        if self.complete:
            self.parts = None
            self.disparities = disparity_range(1 / self.maps.depth)
        if self.complete or self.served_at - self.sent_at > RESEND_SECONDS:
            self.send(STILL_QUALITY if self.complete else MOVING_QUALITY)

    def send(self, quality):
        """Show the picture of `maps` in the browser."""
        self.sent_at, (rows, columns) = time.monotonic(), self.maps.acc.shape
        _, rays_d = self.pictures.rays(self.view.pose(), self.view.camera().resized(rows, columns))
        picture = draw(self.maps, rays_d.cpu().numpy(), self.view.look, self.disparities)
        self.size = columns, rows
        depth = self.scale * self.maps.depth if self.hides_markers else None
        self.client.scene.set_background_image(to8b(picture), format='jpeg', jpeg_quality=quality,
                                               depth=depth)
