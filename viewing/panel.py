"""The panel of one browser: what is shown, cameras and photos, the ray microscope, camera paths."""
import threading
import time
from pathlib import Path

import numpy as np
import torch
from viser import uplot
from viser.transforms import SO3

from run_nerf_helpers import BoundedModule, to8b
from scenes.errors import UserError, first_line
from scenes.paths import interpolate_path, write_camera_path
from training.metrics import psnr
from training.outputs import color_map
from viewing.microscope import csv, examine, table
from viewing.pictures import KINDS, Look, draw
from viewing.session import FLIP

# Photos in the scene and in the panel have at most this many pixels along a side.
THUMBNAIL, PHOTO = 64, 400
# At most this many cameras are shown, evenly chosen.
MAX_CAMERAS = 100
# At most this many sparse points are shown.
MAX_POINTS = 50_000
# The table of the microscope has this many rows.
TABLE_ROWS = 12
# Cameras have this size, in units of the viewer, and lines of this width.
FRUSTUM, LINE = 0.1, 0.005
AXES = {'+x': (1, 0, 0), '-x': (-1, 0, 0), '+y': (0, 1, 0), '-y': (0, -1, 0), '+z': (0, 0, 1),
        '-z': (0, 0, -1)}


class Panel:
    """Builds the panel of one browser, and does what its user asks for.

    Args:
      viewer: the `Viewer`.
      session: the `Session` of the browser.
    """

    def __init__(self, viewer, session):
        self.viewer, self.session, self.client = viewer, session, session.client
        gui = self.gui = self.client.gui
        scene = viewer.scene
        first = [*scene.i_test, *scene.i_val, *scene.i_train][0]
        self.go_to(scene.poses[first], scene.cameras[first])
        if viewer.controls is not None:
            viewer.controls(gui)
        self.status = gui.add_markdown(viewer.status)
        tabs, self.tabs = gui.add_tab_group(), {}
        for title, build in (('View', self.view_tab), ('Photos', self.photo_tab), ('Ray', self.ray_tab),
                             ('Path', self.path_tab)):
            self.tabs[title] = tabs.add_tab(title)
            with self.tabs[title]:
                build()

    # --- what is shown ---

    def view_tab(self):
        gui, look = self.gui, self.session.look
        background = self.viewer.frames.render_kwargs['white_bkgd']
        kind = gui.add_dropdown('show', KINDS, hint='normals are those of the surface at the mean depth')
        color = gui.add_rgb('background', (255, 255, 255) if background else (0, 0, 0))
        rows = gui.add_slider('height', 60, 2160, 20, self.session.max_rows,
                              hint='of the full picture, in pixels')
        up = gui.add_dropdown('up', ['photos', *AXES])
        crop = gui.add_checkbox('crop', False, hint='show only what is in a box')
        low, high = self.default_crop()
        low, high = gui.add_vector3('lowest corner', low), gui.add_vector3('highest corner', high)
        if self.viewer.pictures.render_kwargs['ndc']:  # the networks do not know the scene's coordinates
            crop.visible = low.visible = high.visible = False

        def change(_=None):
            box = (tuple(low.value), tuple(high.value)) if crop.value else None
            self.session.look = look._replace(kind=kind.value, crop=box,
                                              background=tuple(part / 255 for part in color.value))
            self.session.max_rows = int(rows.value)
            self.viewer.wake.set()
        for control in (kind, color, rows, crop, low, high):
            control.on_update(change)

        @up.on_update
        def _(_):
            self.client.camera.up_direction = AXES.get(up.value, self.viewer.up)
        change()

    def default_crop(self):
        """The corners of the box that the networks cover, or else of the cameras."""
        network = self.viewer.pictures.render_kwargs['network_fn']
        for part in network.modules():
            if isinstance(part, BoundedModule):
                return [tuple(round(x, 3) for x in corner) for corner in part.aabb.tolist()]
        centers = self.viewer.scene.poses[:, :, 3].astype(float)
        return [tuple(corner.round(3).tolist()) for corner in (centers.min(0), centers.max(0))]

    # --- cameras ---

    def go_to(self, pose, camera):
        """Look through a `Camera` at `pose` [3, 4]."""
        wxyz, position = self.placed(pose)
        with self.client.atomic():
            self.client.camera.position, self.client.camera.wxyz = position, wxyz
            self.client.camera.fov = np.radians(camera.fov)
        self.viewer.call(self.orbit_about_center(pose, camera))

    def orbit_about_center(self, pose, camera):
        """Let the mouse turn the camera about what it sees in the middle."""
        pictures = self.viewer.pictures
        rows, columns = (slice(3 * size // 8, 5 * size // 8, max(1, size // 32))
                         for size in (camera.H, camera.W))
        rays_o, rays_d = pictures.rays(pose, camera)[:, rows, columns]
        depth = pictures.maps(torch.stack([rays_o, rays_d]), Look()).depth
        if np.isfinite(depth).any():
            _, position = self.placed(pose)
            distance = self.viewer.scale * np.median(depth[np.isfinite(depth)])
            self.client.camera.look_at = position - distance * pose[:, 2]
        yield

    def placed(self, pose):
        """Orientation wxyz and position of a pose [3, 4] in the viewer."""
        return SO3.from_matrix(pose[:, :3] @ FLIP).wxyz, self.viewer.scale * pose[:, 3]

    def frustum(self, name, pose, fov, aspect, **options):
        """Draw a camera with a vertical field of view in degrees."""
        wxyz, position = self.placed(pose)
        return self.client.scene.add_camera_frustum(name, np.radians(fov), aspect, scale=FRUSTUM,
                                                    thickness=LINE, wxyz=wxyz, position=position, **options)

    def photo_tab(self):
        gui, scene = self.gui, self.viewer.scene
        shown = gui.add_checkbox('cameras', False, hint='click one to go there')
        chosen = np.unique(np.linspace(0, len(scene.poses) - 1, MAX_CAMERAS).round().astype(int))
        name = gui.add_dropdown('photo', [self.name_of(view) for view in range(len(scene.poses))])
        go = gui.add_button('go there and compare')
        self.compared = gui.add_markdown('' if scene.images is not None else 'The photos are not there.')
        self.pictures = []
        self.frusta = {}

        @shown.on_update
        def _(_):
            if not self.frusta:
                self.frusta = {int(view): self.photo_frustum(int(view)) for view in chosen}
            for frustum in self.frusta.values():
                frustum.visible = shown.value

        @go.on_click
        def _(_):
            self.show_photo([self.name_of(view) for view in range(len(scene.poses))].index(name.value))
        if scene.points is not None and len(scene.points):
            self.points_control(gui, scene.points)

    def points_control(self, gui, points):
        shown = gui.add_checkbox('sparse points', False)
        every = -(-len(points) // MAX_POINTS)
        cloud = self.client.scene.add_point_cloud('/points', self.viewer.scale * points[::every],
                                                  (255, 80, 0), point_size=0.01, visible=False)

        @shown.on_update
        def _(_):
            cloud.visible = shown.value

    def name_of(self, view):
        names = self.viewer.scene.names
        return f'{view}' if names is None else f'{view}: {names[view]}'

    def photo_frustum(self, view):
        """Draw the camera of a view, with its photo; a click goes there."""
        scene = self.viewer.scene
        camera, image = scene.cameras[view], None
        if scene.images is not None:
            image = shrink(scene.images[view], THUMBNAIL)
        frustum = self.frustum(f'/cameras/{view}', scene.poses[view], camera.fov, camera.W / camera.H,
                               image=image)
        frustum.on_click(lambda _: self.show_photo(view))
        return frustum

    def show_photo(self, view):
        """Go to a view; show its photo beside the picture and their difference."""
        scene = self.viewer.scene
        self.go_to(scene.poses[view], scene.cameras[view])
        if view in self.frusta:
            self.frusta[view].visible = False  # it would be in the way
        if scene.images is not None:
            self.compared.content = f'**{self.name_of(view)}** is being rendered …'
            self.viewer.call(self.compare(view))

    def compare(self, view):
        """Render a view, tile by tile, and show its photo, the picture and their difference."""
        scene, look = self.viewer.scene, self.session.look._replace(kind='colour', crop=None)
        view_of, photo = (scene.poses[view], scene.cameras[view], look), scene.images[view]
        small = self.viewer.pictures.small(*view_of)
        for maps in self.viewer.pictures.refine(small, *view_of):  # noqa: B007 - the last ones are complete
            yield
        rgb = draw(maps, None, look)
        error = np.clip(4 * np.abs(rgb - photo / 255).mean(-1), 0, 1)
        mask = None if scene.masks is None else scene.masks[view]
        self.compared.content = f'**{self.name_of(view)}**: {psnr(to8b(rgb), photo, mask):.2f} dB'
        for picture in self.pictures:
            picture.remove()
        with self.tabs['Photos']:
            self.pictures = [self.gui.add_image(shrink(image, PHOTO), label=label, format='jpeg',
                                                jpeg_quality=90)
                             for label, image in (('photo', photo), ('rendered', to8b(rgb)),
                                                  ('error, bright from 0.25', to8b(color_map(error))))]

    # --- the ray microscope ---

    def ray_tab(self):
        gui = self.gui
        self.examining = gui.add_checkbox('ray microscope', False, hint='then click a pixel')
        self.explanation = gui.add_markdown('Switch it on, and click a pixel of the scene.')
        self.stage = gui.add_slider('step', 1, 2, 1, 1, visible=False)
        self.stage.on_update(lambda _: self.show_step())
        self.steps, self.parts, self.nodes, self.showing = [], [], [], threading.Lock()

        @self.examining.on_update
        def _(_):
            self.session.hides_markers = not self.examining.value
            self.viewer.call(self.session.resend())
            if self.examining.value:
                self.client.scene.on_click()(self.clicked)
            else:
                self.client.scene.remove_click_callback(self.clicked)
                self.clear_ray()

    def clicked(self, event):
        """Examine the ray through the pixel of a click."""
        self.viewer.call(self.examine_ray(*event.screen_pos))

    def examine_ray(self, x, y):
        """Examine the ray through the point (x, y) of the picture, each from 0 to 1."""
        view, pictures = self.session.wanted(), self.viewer.pictures
        rays = pictures.rays(view.pose(), view.camera())
        row, column = (min(int(part * size), size - 1) for part, size in ((y, view.height), (x, view.width)))
        near, far = pictures.bounds(rays[0, 0, 0])
        kwargs = {**pictures.render_kwargs, 'near': near, 'far': far}
        self.steps, *_ = examine(self.viewer.frames, kwargs, *rays[:, row, column])
        self.stage.max, self.stage.visible = len(self.steps), True
        self.pixel = f'pixel ({column}, {row})'
        self.stage.value = len(self.steps)
        self.show_step()
        yield

    def clear_ray(self):
        """Remove plots and points."""
        for part in [*self.parts, *self.nodes]:
            part.remove()
        self.parts, self.nodes, self.steps = [], [], []
        self.stage.visible = False

    def show_step(self):
        """Show the plots, the points and the numbers of the chosen step."""
        with self.showing:  # the slider and a click may call this at the same time
            if self.steps:
                self.replace_step()

    def replace_step(self):
        for part in [*self.parts, *self.nodes]:
            part.remove()
        step = self.steps[int(self.stage.value) - 1]
        samples = step.samples
        title = f'{self.pixel}, step {int(self.stage.value)} of {len(self.steps)}: {step.title}'
        self.explanation.content = f'**{title}**\n\n{step.text}'
        self.parts, self.nodes = [], self.ray_nodes(step)
        if len(samples.t) > 1:
            with self.tabs['Ray']:
                self.show_numbers(step, samples)

    def show_numbers(self, step, samples):
        """Add plots and a table of a step's `Samples`."""
        if step.shows == 'weights':
            self.plot('transmittance T and weight w', samples.t,
                      {'T': (samples.transmittance, '#888'), 'w': (samples.weights, '#d33')})
        if step.shows != 'positions':
            self.plot('density σ', samples.t, {'σ': (samples.sigmas, '#36c')})
            self.plot('colour c', samples.t, {name: (samples.rgb[:, index], color) for index, (name, color)
                                              in enumerate((('r', '#d33'), ('g', '#3a3'), ('b', '#36c')))})
            self.parts.append(self.gui.add_markdown(table(samples, TABLE_ROWS)))
        download = self.gui.add_button('download all numbers (CSV)')
        download.on_click(lambda _: self.client.send_file_download('ray.csv', csv(samples).encode()))
        self.parts.append(download)

    def plot(self, title, t, curves):
        """Plot curves over the positions t: name -> (values, colour)."""
        series = [uplot.Series(label='t'), *(uplot.Series(label=name, stroke=color, width=2)
                                             for name, (_, color) in curves.items())]
        data = [np.asarray(part, np.float64) for part in (t, *(values for values, _ in curves.values()))]
        scales = {'x': uplot.Scale(time=False, auto=True), 'y': uplot.Scale(auto=True)}
        self.parts.append(self.gui.add_uplot(tuple(data), tuple(series), title=title, scales=scales,
                                             height=180))

    def ray_nodes(self, step):
        """Draw a ray and its samples in the scene: larger dots have more weight."""
        samples, scene, scale = step.samples, self.client.scene, self.viewer.scale
        near = np.isfinite(samples.points).all(-1) & (np.abs(samples.points) < 100 / scale).all(-1)
        points = scale * samples.points[near]
        if not len(points):
            return []
        colors = to8b(samples.rgb[near] if step.shows != 'positions' else np.full((len(points), 3), 0.8))
        line = scene.add_line_segments('/ray', np.stack([points[:1], points[-1:]], 1), (255, 0, 255))
        nodes = [line, scene.add_point_cloud('/samples', points, colors, point_size=0.008,
                                             point_shape='circle')]
        heavy = samples.weights[near] > 0.05
        if step.shows == 'weights' and heavy.any():
            nodes.append(scene.add_point_cloud('/heavy_samples', points[heavy], colors[heavy],
                                               point_size=0.02, point_shape='circle'))
        return nodes

    # --- camera paths ---

    def path_tab(self):
        gui = self.gui
        self.keyframes = []  # [pose, field of view in degrees, frustum, gizmo]
        add, clear = gui.add_button('add keyframe'), gui.add_button('remove all')
        self.shows_keyframes = gui.add_checkbox('show keyframes', False, hint='drag them by their axes')
        self.seconds = gui.add_number('seconds', 6.0, min=0.1, step=0.5)
        self.fps = gui.add_number('frames per second', 30, min=1, max=120, step=1)
        self.loop = gui.add_checkbox('loop', False)
        fov = gui.add_number('field of view', 50.0, min=5, max=120, hint='vertical, in degrees')
        preview = gui.add_button('preview')
        self.file = gui.add_text('file', str(Path(self.viewer.folder, 'camera_path.json')))
        save = gui.add_button('save')
        self.saved = gui.add_markdown('Move the camera and add two or more keyframes.')
        add.on_click(lambda _: self.add_keyframe())
        clear.on_click(lambda _: self.remove_keyframes())
        preview.on_click(lambda _: self.preview())
        save.on_click(lambda _: self.save_path())

        @self.shows_keyframes.on_update
        def _(_):
            for *_, gizmo in self.keyframes:
                gizmo.visible = self.shows_keyframes.value

        @fov.on_update
        def _(_):
            self.client.camera.fov = np.radians(fov.value)

    def add_keyframe(self):
        """Make the camera a keyframe, with axes to drag it by."""
        view, index = self.session.wanted(), len(self.keyframes)
        keyframe = [view.pose(), view.fov, None, None]
        name, (wxyz, position) = f'/keyframes/{index}', self.placed(keyframe[0])
        gizmo = self.client.scene.add_transform_controls(
            name, scale=3 * FRUSTUM, wxyz=wxyz, position=position, visible=self.shows_keyframes.value)
        keyframe[2:] = self.client.scene.add_camera_frustum(
            f'{name}/camera', np.radians(view.fov), view.width / view.height, scale=FRUSTUM, thickness=LINE,
            color=(255, 140, 0)), gizmo

        @gizmo.on_update
        def _(_):
            keyframe[0] = np.column_stack([SO3(gizmo.wxyz).as_matrix() @ FLIP,
                                           np.asarray(gizmo.position) / self.viewer.scale])
        self.keyframes.append(keyframe)
        self.saved.content = f'{len(self.keyframes)} keyframes'

    def remove_keyframes(self):
        for *_, frustum, gizmo in self.keyframes:
            frustum.remove()
            gizmo.remove()
        self.keyframes.clear()
        self.saved.content = 'no keyframes'

    def path(self, count):
        """Poses [count, 3, 4] and fields of view [count] through the keyframes, and these. Raises UserError
        if there are fewer than two."""
        if len(self.keyframes) < 2:
            raise UserError(f'found {len(self.keyframes)} keyframes, expected at least 2')
        poses, fovs, *_ = map(np.stack, zip(*self.keyframes))
        segments = len(poses) if self.loop.value else len(poses) - 1
        times = np.arange(len(poses)) * self.seconds.value / segments
        return *interpolate_path(poses, fovs, times, count, self.loop.value), (poses, fovs, times)

    def preview(self):
        """Fly along the path."""
        try:
            poses, fovs, _ = self.path(max(2, int(10 * self.seconds.value)))
        except UserError as error:
            self.saved.content = str(error)
            return
        for pose, fov in zip(poses, fovs):
            wxyz, position = self.placed(pose)
            with self.client.atomic():
                self.client.camera.position, self.client.camera.wxyz = position, wxyz
                self.client.camera.fov = np.radians(fov)
            time.sleep(0.1)

    def save_path(self):
        """Write the path to a file."""
        try:
            poses, fovs, keyframes = self.path(max(2, round(self.seconds.value * self.fps.value)))
            view = self.session.wanted()
            write_camera_path(Path(self.file.value), poses, fovs, self.fps.value,
                              (2 * (view.width // 2), 2 * (view.height // 2)), keyframes, self.loop.value)
        except (UserError, OSError) as error:
            self.saved.content = f'Not saved: {first_line(error)}'
            return
        self.saved.content = f'Saved. Render it with `--render_only --render_poses {self.file.value}`.'


def shrink(image, size):
    """An image [H, W, 3] with every n-th pixel, so that no side exceeds `size`."""
    every = -(-max(image.shape[:2]) // size)
    return np.ascontiguousarray(image[::every, ::every])
