"""The tab of the ray microscope."""
import threading

import numpy as np
from viser import uplot

from run_nerf_helpers import to8b
from viewing.microscope import csv, examine, table
from viewing.tab import Tab

# The table has this many rows.
TABLE_ROWS = 12


class RayTab(Tab):
    """Examines the ray through a clicked pixel: plots, numbers, and points in the scene.

    Attributes:
      steps: the `Step`s of the ray, none before a click.
    """

    def build(self, gui):
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
            with self.page:
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
