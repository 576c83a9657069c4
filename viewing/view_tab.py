"""The tab that chooses what is shown."""
from run_nerf_helpers import BoundedModule
from viewing.pictures import KINDS
from viewing.tab import Tab

AXES = {'+x': (1, 0, 0), '-x': (-1, 0, 0), '+y': (0, 1, 0), '-y': (0, -1, 0), '+z': (0, 0, 1),
        '-z': (0, 0, -1)}


class ViewTab(Tab):
    """Kind of picture, background, size, up axis and crop box."""

    def build(self, gui):
        look = self.session.look
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
