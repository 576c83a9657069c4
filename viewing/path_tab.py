"""The tab that makes camera paths."""
import time
from pathlib import Path

import numpy as np

from scenes.errors import UserError, first_line
from scenes.paths import interpolate_path, write_camera_path
from viewing.tab import FRUSTUM, LINE, Tab


class PathTab(Tab):
    """Adds keyframes, which can be dragged, flies along the path through them, and saves it."""

    def build(self, gui):
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
        name, (wxyz, position) = f'/keyframes/{index}', self.session.placed(keyframe[0])
        gizmo = self.client.scene.add_transform_controls(
            name, scale=3 * FRUSTUM, wxyz=wxyz, position=position, visible=self.shows_keyframes.value)
        keyframe[2:] = self.client.scene.add_camera_frustum(
            f'{name}/camera', np.radians(view.fov), view.width / view.height, scale=FRUSTUM, thickness=LINE,
            color=(255, 140, 0)), gizmo

        @gizmo.on_update
        def _(_):
            keyframe[0] = self.session.pose_of(gizmo)
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
            self.session.go_to(pose, fov)
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
