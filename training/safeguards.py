"""Keeps training healthy: skips steps that are not finite, rolls back after many of them, reinitialises
collapsed networks.

The ReLU on the density gives no gradient to a network that is transparent everywhere. If most pixels show a
bright background, some random seeds end up there in the first steps, and all images stay blank for the rest
of training.
"""
import copy
import math

import torch

from training.checkpoints import restore
from training.processes import derive_seed

# A network is judged by its mean error and opacity over this many steps.
WINDOW_STEPS = 100
# A network whose mean opacity is below this shows nothing; even a small object in a large image has more.
BLANK_OPACITY = 1e-4
# A network whose error exceeds this fraction of the background's error is no better than the background.
BACKGROUND_RATIO = 0.97
# A network makes progress if its error, as a fraction of the background's, falls by more than this.
MIN_PROGRESS = 0.002
# A network that shows nothing has collapsed after this many windows.
BLANK_WINDOWS = 2
# A network that shows something, but nothing better than the background, has collapsed after this many
# windows.
FLAT_WINDOWS = 8
# A network is reinitialised at most this many times.
MAX_RESTARTS = 3
# A window in which the background alone has less error than this is not judged: there was nothing to see.
MIN_BACKGROUND_ERROR = 1e-4
# After this many steps in a row that are not finite, training rolls back to its last checkpoint.
MAX_BAD_STEPS = 10
# On a GPU, whether steps were finite is read once in this many steps.
FLAGS_READ_EVERY = 16


class TrainingFailed(Exception):
    """Training cannot continue."""


class Measures:
    """Means over the rays of a training step, summed up part by part. All are scalar tensors without
    gradient, except `mean_samples`.

    Attributes:
      losses: dict name -> term of the loss.
      errors: dict 'coarse', 'fine' -> mean squared error of the colours of that network; with --random_bkgd
        its expectation over backgrounds.
      opacities: dict 'coarse', 'fine' -> mean opacity of that network.
      background: mean squared error of an image that shows only the background.
      mean_samples: samples per ray, a number; None if the renderer does not count them.
    """

    def __init__(self):
        self.losses, self.errors, self.opacities = {}, {}, {}
        self.background = self.mean_samples = None

    @torch.no_grad()
    def add(self, share, losses, errors, opacities, background, mean_samples=None):
        """Add a part of the step's rays.

        Args:
          share: fraction of the step's rays that are in this part.
          losses, errors, opacities, background, mean_samples: means over its rays, as the attributes.
        """
        def added(before, value):
            part = value if share == 1 else share * value
            return part if before is None else before + part

        for sums, values in ((self.losses, losses), (self.errors, errors), (self.opacities, opacities)):
            for name, value in values.items():  # a term of the loss may be a plain number
                value = torch.as_tensor(value, device=background.device).detach()
                sums[name] = added(sums.get(name), value)
        self.background = added(self.background, background)
        if mean_samples is not None:
            self.mean_samples = added(self.mean_samples, mean_samples)

    @property
    def total(self):
        """The loss: the sum of its terms."""
        return sum(self.losses.values())

    def tensors(self):
        """All scalars, to be averaged over processes in place."""
        if self.mean_samples is not None:
            self.mean_samples = torch.as_tensor(self.mean_samples, device=self.background.device)
        counted = [] if self.mean_samples is None else [self.mean_samples]
        named = [tensor for part in (self.losses, self.errors, self.opacities) for tensor in part.values()]
        return [*named, self.background, *counted]


class CollapseWatch:
    """Detects that a network renders no more than the background: either it is blank, transparent everywhere,
    or it stays flat, with something that is no better than the background.

    The numbers of each step stay on the device, and are read once in WINDOW_STEPS steps.
    """

    def __init__(self):
        self.window, self.steps, self.restarts = None, 0, 0
        self.blank, self.flat = 0, 0  # windows in a row
        self.best = math.inf          # lowest ratio of the network's error to the background's

    def state_dict(self):
        return {**vars(self), 'window': None if self.window is None else self.window.cpu()}

    def load_state_dict(self, state):
        if 'window' not in state:  # of an older version
            state = {**state, 'window': None, 'steps': 0}
        vars(self).update({key: state[key] for key in vars(self)})

    def network_restarted(self):
        """Start watching a reinitialised network."""
        restarts = self.restarts + 1
        self.__init__()
        self.restarts = restarts

    @torch.no_grad()
    def update(self, error, opacity, background):
        """Add a step and return whether the network has collapsed.

        Args:
          error: mean squared error of the network's colours, a scalar tensor, as are the others.
          opacity: mean opacity of its rays.
          background: mean squared error of an image that shows only the background.
        """
        window = error.new_zeros(WINDOW_STEPS, 3) if self.window is None else self.window
        self.window = window.to(error.device)  # it may be from a checkpoint
        torch.stack([error, opacity, background], out=self.window[self.steps])
        self.steps += 1
        if self.steps < WINDOW_STEPS:
            return False

        finite = [row for row in self.window.tolist() if all(map(math.isfinite, row))]
        self.steps = 0
        if not finite:
            return False
        error, opacity, background = (math.fsum(column) / len(finite) for column in zip(*finite))
        if background <= MIN_BACKGROUND_ERROR:
            return False
        ratio = error / background
        progress = ratio < self.best - MIN_PROGRESS
        self.best = min(ratio, self.best)
        self.blank = self.blank + 1 if ratio >= BACKGROUND_RATIO and opacity < BLANK_OPACITY else 0
        self.flat = self.flat + 1 if ratio >= BACKGROUND_RATIO and not progress else 0
        return self.blank >= BLANK_WINDOWS or self.flat >= FLAT_WINDOWS


class Safeguards:
    """Watches over a run and counts what was done about its problems.

    Args:
      networks: {'coarse': network} or {'coarse': network, 'fine': network}, with `reset_parameters`.
      optimizer: the optimizer of all that is trained.
      seed: of the run; new initialisations derive theirs from it.
      restart: whether collapsed networks are reinitialised.
      say: called with a line for each action.
      followers: dict of what depends on the networks by its name in checkpoints, such as the renderer: reset
        with them, and restored with them.
    Attributes:
      restarts: number of restarts of networks.
      bad_steps: number of steps skipped because they were not finite, `bad_in_a_row` of them just now.
      rollbacks: how often training rolled back to a checkpoint.
    """

    COUNTS = ('restarts', 'bad_steps', 'bad_in_a_row', 'rollbacks')

    def __init__(self, networks, optimizer, seed, restart, say, followers=None):
        self.networks, self.optimizer, self.followers = networks, optimizer, followers or {}
        self.seed, self.restart, self.say = seed, restart, say
        self.watches = {name: CollapseWatch() for name in networks}
        self.restarts = self.bad_steps = self.bad_in_a_row = self.rollbacks = 0
        self.flags, self.num_flags = None, 0  # on a GPU, of the latest steps: not 0 for bad ones
        if restart:
            for network in networks.values():  # a missing `reset_parameters` is an error now, not hours later
                reinitialize(copy.deepcopy(network), seed)

    def state_dict(self):
        return {**{key: vars(self)[key] for key in self.COUNTS}, **self.counts_so_far(),
                'watches': {name: watch.state_dict() for name, watch in self.watches.items()}}

    def load_state_dict(self, state):
        vars(self).update({key: state[key] for key in self.COUNTS})
        for name, watch in self.watches.items():
            if name in state['watches']:
                watch.load_state_dict(state['watches'][name])

    def recover(self, step, measures, checkpoints, processes):
        """After `step`: roll back if too many steps in a row were not finite, and reinitialise collapsed
        networks."""
        if self.bad_in_a_row >= MAX_BAD_STEPS:
            self.roll_back(checkpoints, processes)
        if self.restart:
            self.restart_collapsed(step, measures)

    # --- steps that are not finite ---

    def is_healthy(self):
        """Whether the latest step was finite, so that its state is worth saving."""
        return self.counts_so_far()['bad_in_a_row'] == 0

    @property
    def lrate_scale(self):
        """Factor of the learning rate: a tenth for each time that training rolled back."""
        return 0.1 ** self.rollbacks

    def all_finite(self, measures):
        """Whether the optimizer may step, because the loss and all gradients are finite. Counts the bad
        steps.

        On a GPU the fused Adam itself skips a step whose `found_inf` is not zero. The host reads these flags
        only once in FLAGS_READ_EVERY steps, because it has to wait for them.

        Raises:
          TrainingFailed: too many in a row, although training rolled back before.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        numbers = [*measures.losses.values(), *gradients]
        if not (numbers[0].is_cuda and self.optimizer.defaults.get('fused')):
            norm = torch.nn.utils.get_total_norm(numbers)  # finite only if every number is
            self.count([0 if math.isfinite(norm.item()) else 1])
            return self.bad_in_a_row == 0
        if self.flags is None:
            self.flags, self.one = numbers[0].new_zeros(FLAGS_READ_EVERY), torch.ones_like(numbers[0])
        self.optimizer.found_inf = self.flags[self.num_flags]
        # multiplies by one and sets the flag, in one pass over all gradients
        torch._amp_foreach_non_finite_check_and_unscale_(numbers, self.optimizer.found_inf, self.one)
        self.num_flags += 1
        if self.num_flags == FLAGS_READ_EVERY:
            flags = self.flags.tolist()
            self.flags, self.num_flags = None, 0
            self.count(flags)
        return True

    def counts_so_far(self):
        """`bad_steps` and `bad_in_a_row`, including steps whose flags are still on the GPU."""
        return self.counts_after(self.flags[:self.num_flags].tolist() if self.num_flags else [])

    def counts_after(self, flags):
        """`bad_steps` and `bad_in_a_row` after further steps with `flags`, which are not 0 for bad steps."""
        bad_steps, bad_in_a_row = self.bad_steps, self.bad_in_a_row
        for flag in flags:
            bad_steps, bad_in_a_row = bad_steps + (flag != 0), bad_in_a_row + 1 if flag else 0
        return {'bad_steps': bad_steps, 'bad_in_a_row': bad_in_a_row}

    def count(self, flags):
        """Count further steps with `flags`, which are not 0 for bad steps."""
        counts = self.counts_after(flags)
        skipped = counts['bad_steps'] - self.bad_steps
        vars(self).update(counts)
        if skipped:
            steps = 'a step was skipped' if skipped == 1 else f'{skipped} steps were skipped'
            self.say(f'a loss or gradient is not finite: {steps} ({self.bad_steps} so far)')
        if self.bad_in_a_row >= MAX_BAD_STEPS and self.rollbacks:
            raise TrainingFailed(
                f'{MAX_BAD_STEPS} steps in a row are not finite, even at a tenth of the learning rate; '
                'try a smaller --lrate, and check the images and poses of the scene')

    def roll_back(self, checkpoints, processes):
        """Restore the networks and the optimizer from this run's newest checkpoint, or reinitialise
        them if there is none, and continue at a tenth of the learning rate. The step number and the
        random state are not rolled back."""
        path, state = processes.from_rank0(checkpoints.read_newest)
        if state is None:
            for name in self.networks:
                self._reinitialize(name, self.seed)
        else:
            coarse, fine = self.networks['coarse'], self.networks.get('fine')
            restore(path, state, {'network_fn': coarse, 'network_fine': fine, 'optimizer': self.optimizer,
                                  **self.followers})
        self.rollbacks, self.bad_in_a_row = self.rollbacks + 1, 0
        self.say(f'{MAX_BAD_STEPS} steps in a row were not finite: back to {path or "new networks"}, '
                 'with a tenth of the learning rate')

    # --- networks that collapsed ---

    def restart_collapsed(self, step, measures):
        """Reinitialise networks that show nothing but the background, after `step`."""
        for name, watch in self.watches.items():
            if name not in measures.errors:  # the renderer does not use this network
                continue
            collapsed = watch.update(measures.errors[name], measures.opacities[name], measures.background)
            if collapsed and watch.restarts < MAX_RESTARTS:
                self.restarts += 1
                seed = derive_seed(self.seed, step, self.restarts)
                self._reinitialize(name, seed)
                watch.network_restarted()
                self.say(f'step {step}: the {name} network shows nothing but the background; '
                         f'it starts again with seed {seed}')

    def _reinitialize(self, name, seed):
        """Draw new parameters of a network from `seed`, reset what depends on them, and drop the history of
        both in the optimizer."""
        reinitialize(self.networks[name], seed)
        for follower in self.followers.values():
            follower.reset()
        for part in (self.networks[name], *self.followers.values()):
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                self.optimizer.state.pop(parameter, None)


def reinitialize(network, seed):
    """Draw new parameters of a network from `seed`; the random state of the run stays as it is."""
    devices = {parameter.device for parameter in network.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        network.reset_parameters()
