"""The tab that shows the cameras of the photos, and compares pictures with photos."""
import numpy as np

from run_nerf_helpers import to8b
from training.metrics import psnr
from training.outputs import color_map
from viewing.pictures import draw
from viewing.tab import FRUSTUM, LINE, Tab

# Photos in the scene and in the panel have at most this many pixels along a side.
THUMBNAIL, PHOTO = 64, 400
# At most this many cameras are shown, evenly chosen.
MAX_CAMERAS = 100
# At most this many sparse points are shown.
MAX_POINTS = 50_000


class PhotoTab(Tab):
    """Cameras as frustums, photos and errors, sparse points."""

    def build(self, gui):
        scene = self.viewer.scene
        shown = gui.add_checkbox('cameras', False, hint='click one to go there')
        chosen = np.unique(np.linspace(0, len(scene.poses) - 1, MAX_CAMERAS).round().astype(int))
        names = [self.name_of(view) for view in range(len(scene.poses))]
        name = gui.add_dropdown('photo', names)
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
            self.show_photo(names.index(name.value))
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
        wxyz, position = self.session.placed(scene.poses[view])
        frustum = self.client.scene.add_camera_frustum(
            f'/cameras/{view}', np.radians(camera.fov), camera.W / camera.H, scale=FRUSTUM, thickness=LINE,
            wxyz=wxyz, position=position, image=image)
        frustum.on_click(lambda _: self.show_photo(view))
        return frustum

    def show_photo(self, view):
        """Go to a view; show its photo beside the picture and their difference."""
        scene = self.viewer.scene
        self.viewer.go_to(self.session, scene.poses[view], scene.cameras[view])
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
        with self.page:
            self.pictures = [self.gui.add_image(shrink(image, PHOTO), label=label, format='jpeg',
                                                jpeg_quality=90)
                             for label, image in (('photo', photo), ('rendered', to8b(rgb)),
                                                  ('error, bright from 0.25', to8b(color_map(error))))]


def shrink(image, size):
    """An image [H, W, 3] with every n-th pixel, so that no side exceeds `size`."""
    every = -(-max(image.shape[:2]) // size)
    return np.ascontiguousarray(image[::every, ::every])
