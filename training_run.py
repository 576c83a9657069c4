"""What accompanies a training run: its log, its checkpoints, and the watch over its health."""
import sys
from pathlib import Path

from checkpoints import CheckpointKeeper, save_checkpoint
from health import Health
from run_log import RunLog, describe_run, prepare_folder


def camera(scene, render_kwargs):
    """What a renderer needs to know of the scene beside the networks, as plain numbers and tensors for a checkpoint."""
    known = {key: render_kwargs[key] for key in ('ndc', 'lindisp', 'pixel_centers', 'white_bkgd')}
    return {**known, **scene.cameras()}


def start_run(args, scene, path, state, render_kwargs, start, optimizer, console, ranks):
    """Open the log and the folder of a run.

    Args:
      args: the options.  scene: a `Scene`.  console: a `Console`.  ranks: a `Ranks`; the first one alone writes.
      path, state: the checkpoint that the run goes on from, or None.
      render_kwargs: with the networks.
      start: steps done so far.
    Returns:
      a `RunLog`, a `CheckpointKeeper`, a `Health`.
    """
    networks = {'coarse': render_kwargs['network_fn'], 'fine': render_kwargs['network_fine']}
    networks = {name: network for name, network in networks.items() if network is not None}
    device = next(networks['coarse'].parameters()).device
    folder = Path(args.basedir, args.expname)
    if ranks.first:
        prepare_folder(folder, args, start, device)
        console.log_to(folder / 'log.txt')
        console.say(describe_run(args, scene, device, networks, folder, start, ranks.size))

    health = Health(networks, optimizer, args.seed, not args.no_restart, console.say)
    in_chunks = render_kwargs['network_query_fn'].keywords['in_chunks']
    if state is not None and state['health']:
        health.load_state_dict(state['health'])
        in_chunks.load_state_dict(state['with_gradient'], networks)

    def write(path, step):
        save_checkpoint(path, step, networks['coarse'], networks.get('fine'), optimizer, args, camera(scene, render_kwargs),
                        health.state_dict(), in_chunks.state_dict(networks))
    keeper = CheckpointKeeper(folder, args.i_weights, args.save_minutes, args.N_iters, write, console.say, newest=path,
                              idle=not ranks.first)
    return RunLog(args, folder, start, device, console, idle=not ranks.first), keeper, health


def end_run(log, keeper, ranks, stop):
    """Save what is not saved and say where everything is; the exit code. Where another process has ended, what is done is
    saved by one that is left."""
    if ranks.first:
        log.finish(keeper)
    elif ((ranks.lost or stop.signal) and log.done > log.start and ranks.should_save(keeper.path(log.done))
          and keeper.save(log.done)):
        print(f'process {ranks.index}: saved {keeper.newest}', file=sys.__stderr__)
    if ranks.stopping or not stop.signal:
        ranks.leave()
    return stop.exit_code or int(ranks.lost)


class Follower:
    """In the place of `Reports` in a process that is not the first: it renders what the first one asks for.

    Args:
      ranks: a `Ranks`.
      render: a function (pose, …) that renders a frame.
    """

    def __init__(self, ranks, render):
        self.ranks, self.render = ranks, render

    def write_due(self, log, step, missing=False):
        self.ranks.serve(self.render)

    def render_only(self, start):
        self.ranks.serve(self.render)

    def done(self):
        pass
