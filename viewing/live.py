"""Shows a run in the browser while it trains: `--viewer`."""
import time

import numpy as np

from scenes.errors import first_line

# Rendering for browsers takes at most this fraction of the time.
SHARE = 0.1
# One picture or tile takes about this long: ten a second fit into SHARE.
UNIT_SECONDS = 0.01
# Time that is not used is kept, but not more than this.
MAX_CREDIT = 0.2
# A complete picture is rendered again after this long, with the newest parameters.
REFRESH_SECONDS = 2.0
# The panel is updated this often, because reading the loss waits for a GPU.
REPORT_SECONDS = 1.0
# When the curves have this many points, every second one is dropped.
MAX_POINTS = 600


class LiveViewer:
    """A `Viewer` of the networks in training. It renders between steps, in the thread that trains, and draws
    no random numbers, so the run stays the same. If the viewer fails, training continues.

    Args:
      args: the options; without --viewer nothing is shown.
      scene: a `Scene`; frames: the `FrameRenderer` of the run.
      processes: a `Processes`; rank 0 shows the run.
      stop: a `StopRequest`, which ends a pause.
      say: called with each line for the console.
    Raises:
      UserError: viser is not installed, or the port cannot be used.
    """

    def __init__(self, args, scene, frames, processes, stop, say):
        self.viewer, self.stop, self.say, self.args = None, stop, say, args
        self.can_pause, self.paused, self.panels, self.history = processes.size == 1, False, [], []
        self.credit = self.left_at = self.refreshed_at = self.reported_at = self.rendered = 0.0
        if args.viewer and processes.is_main:
            from viewing.viewer import Viewer
            self.viewer = Viewer(args.expname, scene, frames, frames.view_kwargs, port=args.viewer_port,
                                 folder=f'{args.basedir}/{args.expname}', unit_seconds=UNIT_SECONDS,
                                 controls=self.add_controls)
            self.started_at = self.left_at = time.perf_counter()
            say(f'viewer: {self.viewer.address}')

    def after_step(self, step, measures):
        """Render for browsers, for about SHARE of the time since the last call; longer in a pause.

        Args:
          step: the number of the step; measures: its `Measures`.
        """
        if self.viewer is None:
            return
        try:
            self.serve(step, measures)
        except Exception as error:  # whatever it is, the run is worth more
            self.say(f'viewer: closed ({first_line(error)}); training continues')
            self.close()

    def serve(self, step, measures):
        began_at = time.perf_counter()
        self.credit = min(MAX_CREDIT, self.credit + SHARE / (1 - SHARE) * (began_at - self.left_at))
        if began_at - self.refreshed_at > REFRESH_SECONDS:
            self.refreshed_at = began_at
            self.viewer.networks_changed(complete_only=True)
        if began_at - self.reported_at > REPORT_SECONDS and self.panels:
            self.reported_at = began_at
            self.report(step, measures)
        while self.credit > 0:
            unit_began_at = time.perf_counter()
            if not self.viewer.work():
                break
            self.credit -= time.perf_counter() - unit_began_at
        self.rendered += time.perf_counter() - began_at
        while self.paused and self.viewer.sessions and not self.stop.requested:
            self.viewer.work(0.1)
        self.left_at = time.perf_counter()

    def report(self, step, measures):
        """Show the progress in all panels."""
        error = float(list(measures.errors.values())[-1])
        self.history.append((step, float(measures.total), -10 * np.log10(max(error, 1e-10))))
        if len(self.history) > MAX_POINTS:
            self.history = self.history[::2]
        share = self.rendered / (time.perf_counter() - self.started_at)
        text = (f'step {step:,} of {self.args.N_iters:,}, PSNR {self.history[-1][2]:.2f} dB; '
                f'the viewer takes {share:.0%} of the time')
        steps, losses, psnrs = np.array(self.history, np.float64).T
        for line, loss, psnr in self.panels:
            line.content = text
            if len(steps) > 1:
                loss.data, psnr.data = (steps, losses), (steps, psnrs)
                loss.visible = psnr.visible = True

    def add_controls(self, gui):
        """Add progress, the curves of loss and PSNR, and a pause to a panel."""
        from viser import uplot

        def curve(title):
            series = uplot.Series(label='step'), uplot.Series(label=title, stroke='#36c', width=2)
            return gui.add_uplot((np.zeros(2), np.zeros(2)), series, title=title, height=140, visible=False,
                                 scales={'x': uplot.Scale(time=False, auto=True)})
        line = gui.add_markdown('')
        if self.can_pause:
            pause = gui.add_button('pause', hint='training waits until you continue')

            @pause.on_click
            def _(_):
                self.paused = not self.paused
                pause.label = 'continue' if self.paused else 'pause'
                self.viewer.wake.set()
        self.panels.append((line, curve('loss'), curve('PSNR of the training rays')))

    def close(self):
        """Stop the server."""
        if self.viewer is not None:
            self.viewer.close()
        self.viewer = None
