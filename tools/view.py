"""Shows a trained scene in the browser: fly around, look at depths and normals, compare with the photos,
follow a ray through the method, make a camera path.

    python tools/view.py logs/lego_fast

docs/viewer.md says what is on the page. The newest checkpoint is shown, also while a run writes more.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scenes.errors import UserError, first_line, print_any_text
from tools.trained import load_trained
from training.checkpoints import networks_of, read_checkpoint, restore
from training.signals import Stopped, StopRequest
from training.threads import yield_when_busy

# The folder of a run is searched for a newer checkpoint after this many seconds.
POLL_SECONDS = 2.0


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog='view.py', description='Show a trained scene in the browser.',
        epilog='Other options are those of run_nerf.py, such as --datadir DIR or --device cuda; '
               'they override those of the checkpoint.')
    parser.add_argument('run', type=Path, help='folder of a run, such as logs/lego_fast, or a checkpoint')
    parser.add_argument('--host', default='127.0.0.1', help='0.0.0.0 lets other machines connect')
    parser.add_argument('--port', type=int, default=8080, help='or the next one that is free')
    parser.add_argument('--no_photos', action='store_true', help='do not load the photos')
    return parser.parse_known_args(argv)


class Newest:
    """Follows the newest checkpoint of a run.

    Args:
      run: the folder of the run; if it is a file, that one is followed.
      trained: the `Trained` whose networks get the parameters.
    """

    def __init__(self, run, trained):
        self.run, self.trained = run, trained
        self.seen = self.stamp()

    def stamp(self):
        """Path, size and time of the newest checkpoint; None if there is none."""
        paths = [self.run]
        if self.run.is_dir():
            paths = [path for path in self.run.glob('*.tar') if path.stem.isdigit()]
        if not paths:
            return None
        path = max(paths, key=lambda path: int(path.stem) if path.stem.isdigit() else 0)
        try:
            return path, path.stat().st_size, path.stat().st_mtime_ns
        except OSError:
            return None

    def load_if_changed(self):
        """Load the newest checkpoint if it is not loaded yet; returns its step or None. A file that cannot be
        used, maybe because it is still being copied, is left out until it changes.

        Raises:
          UserError: it cannot be used.
        """
        stamp = self.stamp()
        if stamp in (None, self.seen):
            return None
        self.seen = stamp
        state = read_checkpoint(stamp[0])
        kwargs = self.trained.render_kwargs
        parts = {'network_' + {'coarse': 'fn', 'fine': 'fine'}[name]: network
                 for name, network in networks_of(kwargs).items()}
        restore(stamp[0], state, {**parts, 'renderer': kwargs['renderer']})
        self.trained.frames.drop_cache()
        return state['steps_done']


def run(args, options, stop):
    """Serve the page until a signal comes."""
    with stop.interruptible():
        from viewing.viewer import Viewer
        trained = load_trained(args.run, options, not args.no_photos, say)
    folder = args.run if args.run.is_dir() else args.run.parent
    frames = trained.frames
    frames.render_kwargs['renderer'].checked = False  # that would cost more than the picture
    viewer = Viewer(folder.resolve().name, trained.scene, frames, frames.render_kwargs, args.host, args.port,
                    folder)
    viewer.show_status(f'step {trained.step}')
    print(f'{trained.path}, step {trained.step}: {viewer.address} (Ctrl-C ends)', flush=True)
    newest, polled_at = Newest(args.run, trained), time.monotonic()
    with stop.interruptible():
        while True:
            viewer.work(POLL_SECONDS)
            if time.monotonic() - polled_at > POLL_SECONDS:
                polled_at = time.monotonic()
                try:
                    step = newest.load_if_changed()
                except UserError as error:
                    say(f'not shown: {error}')
                    continue
                if step is not None:
                    viewer.show_status(f'step {step}')
                    viewer.networks_changed()


def main(argv=None):
    """Run the program; returns 2 for errors that the user can fix, 128 + n for signal n."""
    print_any_text()
    args, options = parse_args(argv)
    try:
        with yield_when_busy(), StopRequest(say) as stop:
            run(args, options, stop)
    except Stopped as stopped:
        return stopped.exit_code
    except (UserError, OSError) as error:
        print(f'view.py: error: {first_line(error)}', file=sys.stderr)
        return 2
    return 0


def say(message):
    print(message, file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
