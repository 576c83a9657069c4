"""Is the training well? Networks whose density died are found and started again; steps that are not finite are left out.

A ReLU on the density means that a network which is transparent everywhere gets no gradient any more. With a bright
background in most pixels that happens to some seeds in the first steps: the picture stays blank for as long as it trains.
"""
import math

import torch

from checkpoints import restore, restore_random_state

WINDOW = 100            # steps that are judged together
BLANK_OPACITY = 1e-4    # a network of less mean opacity is dead; a small object in a large picture has more
NO_BETTER = 0.97        # an error of more than this share of the background's own is no better than it
PROGRESS = 0.002        # a share that falls by this much is progress
BLANK_WINDOWS = 2       # a dead network is given up after so many windows
FLAT_WINDOWS = 8        # one that shows something, but no better than the background and without progress, after so many
MOST_RESTARTS = 3       # of one network; then it is left alone
BRIGHT_ENOUGH = 1e-4    # where the background itself is as near to the images as this, there is nothing to see
BAD_STEPS = 10          # not finite so often in a row: back to the last good state


class TrainingFailed(Exception):
    """Training cannot go on."""


class CollapseWatch:
    """Finds a network that renders no more than the background.

    Each step adds to sums on the device; every WINDOW steps they are read and judged.
    """

    def __init__(self):
        self.sums, self.steps, self.restarts = None, 0, 0
        self.blank, self.flat, self.best = 0, 0, math.inf

    def state_dict(self):
        return {**vars(self), 'sums': None if self.sums is None else self.sums.cpu()}

    def load_state_dict(self, state):
        vars(self).update({key: state[key] for key in vars(self)})

    def started_again(self):
        """The network is a new one."""
        self.sums, self.steps, self.restarts = None, 0, self.restarts + 1
        self.blank, self.flat, self.best = 0, 0, math.inf

    @torch.no_grad()
    def collapsed(self, mse, acc, background_mse):
        """Add a step, all scalar tensors: error, mean opacity, and the error of the background alone; True if the network
        is to be given up."""
        numbers = torch.stack([mse, acc, background_mse]).detach()
        finite = torch.isfinite(numbers).all()
        numbers = torch.where(finite, numbers, torch.zeros_like(numbers))
        self.sums = numbers if self.sums is None else self.sums.to(numbers.device) + numbers
        self.steps += 1
        if self.steps < WINDOW:
            return False
        mse, acc, background = (self.sums / self.steps).tolist()
        self.sums, self.steps = None, 0
        share = mse / background if background > BRIGHT_ENOUGH else 0.0
        progress, self.best = share < self.best - PROGRESS, min(share, self.best)
        self.blank = self.blank + 1 if share >= NO_BETTER and acc < BLANK_OPACITY else 0
        self.flat = self.flat + 1 if share >= NO_BETTER and not progress else 0
        return self.blank >= BLANK_WINDOWS or self.flat >= FLAT_WINDOWS


def start_again(network, optimizer, seed):
    """Give `network` the weights that `seed` makes, and forget what `optimizer` knew of it; torch's random state stays."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in network.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()
    for parameter in network.parameters():
        optimizer.state.pop(parameter, None)


class Health:
    """Watches over a run: collapsed networks, steps that are not finite, and what was done about them.

    Args:
      networks: {'coarse': network, 'fine': network}.
      optimizer: theirs.
      seed: a network that is started again gets the next one.
      restart: whether collapsed networks are started again.
      say: called with a line for each thing that was done.
    """

    def __init__(self, networks, optimizer, seed, restart, say):
        self.networks, self.optimizer, self.seed, self.restart, self.say = networks, optimizer, seed, restart, say
        self.watches = {name: CollapseWatch() for name in networks}
        self.restarts, self.bad_steps, self.bad_in_a_row, self.returns = 0, 0, 0, 0

    COUNTS = ('restarts', 'bad_steps', 'bad_in_a_row', 'returns')

    def state_dict(self):
        return {**{key: getattr(self, key) for key in self.COUNTS},
                'watches': {name: watch.state_dict() for name, watch in self.watches.items()}}

    def load_state_dict(self, state):
        for key in self.COUNTS:
            setattr(self, key, state[key])
        for name, watch in self.watches.items():
            if name in state['watches']:
                watch.load_state_dict(state['watches'][name])

    @property
    def lrate_scale(self):
        """A smaller learning rate after a return to an earlier state."""
        return 0.1 ** self.returns

    def step_is_finite(self, loss):
        """Whether loss and gradients are finite, so that the optimizer may step. Counts those that are not.

        Raises:
          TrainingFailed: too many in a row, after a return to a good state too.
        """
        gradients = [p.grad for network in self.networks.values() for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([loss.detach(), *gradients])  # not finite if any number is not
        if math.isfinite(norm.item()):
            self.bad_in_a_row = 0
            return True
        self.bad_steps += 1
        self.bad_in_a_row += 1
        self.say(f'a loss or gradient is not finite: this step is left out ({self.bad_steps} so far)')
        if self.bad_in_a_row >= BAD_STEPS and self.returns:
            raise TrainingFailed(f'{BAD_STEPS} steps in a row are not finite, at a tenth of the learning rate too; '
                                 'try a smaller --lrate, and look at the images and poses of the scene')
        return False

    @property
    def must_return(self):
        """Whether so many steps in a row were not finite that the run should go back to its last good state."""
        return self.bad_in_a_row >= BAD_STEPS

    def returned(self):
        """The run has gone back: from now on with a smaller learning rate."""
        self.returns, self.bad_in_a_row = self.returns + 1, 0

    @torch.no_grad()
    def watch(self, step, errors, opacities, background):
        """Look for collapsed networks, and start them again.

        Args:
          errors, opacities: of the networks [1 or 2]: mean squared error and mean opacity of the step's rays.
          background: the error of the background alone, a scalar.
        """
        if not self.restart:
            return
        for (name, watch), error, opacity in zip(self.watches.items(), errors, opacities):
            collapsed = watch.collapsed(error, opacity, background)
            if collapsed and watch.restarts < MOST_RESTARTS:
                self.restarts += 1
                start_again(self.networks[name], self.optimizer, self.seed + self.restarts)
                watch.started_again()
                self.say(f'step {step}: the {name} network shows nothing but the background; it starts again with seed '
                         f'{self.seed + self.restarts}')


def go_back(args, keeper, health, optimizer, ranks):
    """After too many steps that were not finite: load the newest checkpoint of this run or the one that it started from, or
    start anew where there is none, with a smaller learning rate. Returns the steps done by then."""
    path, state = ranks.from_first(keeper.read_newest)
    health.returned()
    if state is None:
        for network in health.networks.values():
            start_again(network, optimizer, args.seed)
    else:
        restore(path, state, health.networks['coarse'], health.networks.get('fine'), optimizer)
        restore_random_state(state, args.seed)
    health.say(f'{BAD_STEPS} steps in a row were not finite: back to {path or "the start"}, '
               'with a tenth of the learning rate')
    steps_done = 0 if state is None else state['steps_done']
    ranks.part_ways(args.seed, steps_done)
    return steps_done
