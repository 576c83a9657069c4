"""Keeps training healthy: skips bad steps, goes back after many of them, restarts collapsed networks.

The ReLU on the density gives no gradient to a network that is transparent everywhere. If most pixels show a bright
background, some random seeds end up there in the first steps, and all images stay blank for the rest of training.
"""
import math

import torch

from training.checkpoints import restore
from training.processes import derive_seed

# A network is judged by its mean loss and opacity over this many steps.
WINDOW = 100
# A network of less mean opacity shows nothing; a small object in a large picture has more.
BLANK_OPACITY = 1e-4
# A loss above this fraction of the background's loss is no better than the background.
BACKGROUND_RATIO = 0.97
# A network makes progress if that fraction falls by more than this.
MIN_PROGRESS = 0.002
# A network that shows nothing has collapsed after this many windows.
BLANK_WINDOWS = 2
# A network that shows something, but nothing better than the background, has collapsed after this many windows.
FLAT_WINDOWS = 8
# A network is restarted at most this many times.
MAX_RESTARTS = 3
# Where the background alone has less loss than this, there is nothing to see, and no network is judged.
MIN_BACKGROUND_LOSS = 1e-4
# After this many steps in a row that are not finite, training goes back to its last checkpoint.
BAD_STEPS = 10


class TrainingFailed(Exception):
    """Training cannot continue."""


class Measures:
    """Means over the rays of a training step, summed up part by part. All are scalar tensors without gradient.

    Attributes:
      losses: dict name -> term of the loss; 'coarse' and 'fine' are the colour losses of the networks.
      opacities: dict 'coarse', 'fine' -> mean opacity.
      background: colour loss of an empty picture.
      num_samples: samples per ray, None if the renderer does not count them.
    """

    def __init__(self):
        self.losses, self.opacities, self.background, self.num_samples = {}, {}, 0.0, None

    @torch.no_grad()
    def add(self, share, losses, opacities, background, num_samples=None):
        """Add the means over a part of the step's rays.

        Args:
          share: fraction of the step's rays that are in this part.
          others: as the attributes.
        """
        for sums, means in ((self.losses, losses), (self.opacities, opacities)):
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + share * mean
        self.background = self.background + share * background
        if num_samples is not None:
            self.num_samples = (0.0 if self.num_samples is None else self.num_samples) + share * num_samples

    @property
    def total(self):
        """The loss: the sum of its terms."""
        return sum(self.losses.values())

    def tensors(self):
        """All scalars, to be averaged over processes in place."""
        counted = [] if self.num_samples is None else [self.num_samples]
        return [*self.losses.values(), *self.opacities.values(), self.background, *counted]


class CollapseWatch:
    """Detects that a network renders no more than the background.

    Each step is added to sums on the device, which are read once in WINDOW steps.
    """

    def __init__(self):
        self.sums, self.steps, self.restarts = None, 0, 0
        self.blank, self.flat, self.best = 0, 0, math.inf  # windows in a row, and the lowest ratio so far

    def state_dict(self):
        return {**vars(self), 'sums': None if self.sums is None else self.sums.cpu()}

    def load_state_dict(self, state):
        vars(self).update({key: state[key] for key in vars(self)})

    def network_restarted(self):
        """Start watching a reinitialised network."""
        restarts = self.restarts + 1
        self.__init__()
        self.restarts = restarts

    @torch.no_grad()
    def update(self, loss, opacity, background):
        """Add a step and return whether the network has collapsed.

        Args:
          loss: colour loss of the network, a scalar tensor, as are the others.
          opacity: mean opacity of its rays.
          background: colour loss of an empty picture.
        """
        numbers = torch.stack([loss, opacity, background])
        numbers = torch.where(torch.isfinite(numbers).all(), numbers, torch.zeros_like(numbers))
        self.sums = numbers if self.sums is None else self.sums.to(numbers.device) + numbers
        self.steps += 1
        if self.steps < WINDOW:
            return False

        loss, opacity, background = (self.sums / self.steps).tolist()
        self.sums, self.steps = None, 0
        ratio = loss / background if background > MIN_BACKGROUND_LOSS else 0.0
        progress, self.best = ratio < self.best - MIN_PROGRESS, min(ratio, self.best)
        self.blank = self.blank + 1 if ratio >= BACKGROUND_RATIO and opacity < BLANK_OPACITY else 0
        self.flat = self.flat + 1 if ratio >= BACKGROUND_RATIO and not progress else 0
        return self.blank >= BLANK_WINDOWS or self.flat >= FLAT_WINDOWS


class Safeguards:
    """Watches over a run and keeps count of what was done about its problems.

    Args:
      networks: {'coarse': network} or {'coarse': network, 'fine': network}, with `reset_parameters`.
      optimizer: the optimizer of all that is trained.
      seed: of the run; new initialisations derive theirs from it.
      restart: whether collapsed networks are restarted.
      say: called with a line for each action.
      renderer: a `Renderer` that follows the networks, reset and restored with them; None if there is none.
    Attributes:
      restarts: number of restarts of networks.
      bad_steps: number of steps skipped because they were not finite, `bad_in_a_row` of them just now.
      returns: how often training went back to a checkpoint.
    """

    COUNTS = ('restarts', 'bad_steps', 'bad_in_a_row', 'returns')

    def __init__(self, networks, optimizer, seed, restart, say, renderer=None):
        self.networks, self.optimizer, self.renderer = networks, optimizer, renderer
        self.seed, self.restart, self.say = seed, restart, say
        self.watches = {name: CollapseWatch() for name in networks}
        self.restarts = self.bad_steps = self.bad_in_a_row = self.returns = 0

    def state_dict(self):
        return {**{key: vars(self)[key] for key in self.COUNTS},
                'watches': {name: watch.state_dict() for name, watch in self.watches.items()}}

    def load_state_dict(self, state):
        vars(self).update({key: state[key] for key in self.COUNTS})
        for name, watch in self.watches.items():
            if name in state['watches']:
                watch.load_state_dict(state['watches'][name])

    # --- steps that are not finite ---

    @property
    def healthy(self):
        """Whether the latest step was finite, so that its state is worth saving."""
        return self.bad_in_a_row == 0

    @property
    def must_go_back(self):
        """Whether too many steps in a row were not finite."""
        return self.bad_in_a_row >= BAD_STEPS

    @property
    def lrate_scale(self):
        """Factor of the learning rate: a tenth for each time that training went back."""
        return 0.1 ** self.returns

    def finite(self, measures):
        """Whether the loss and all gradients are finite, so that the optimizer may step. Counts the bad steps.

        Raises:
          TrainingFailed: too many in a row, although training went back before.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([measures.total, *gradients])  # finite only if every number is
        if math.isfinite(norm.item()):
            self.bad_in_a_row = 0
            return True
        self.bad_steps += 1
        self.bad_in_a_row += 1
        self.say(f'a loss or gradient is not finite: this step is skipped ({self.bad_steps} so far)')
        if self.must_go_back and self.returns:
            raise TrainingFailed(
                f'{BAD_STEPS} steps in a row are not finite, even at a tenth of the learning rate; '
                'try a smaller --lrate, and check the images and poses of the scene')
        return False

    def go_back(self, checkpoints, processes):
        """Take the networks and optimizer state of this run's newest checkpoint, or new networks if there is none,
        and continue at a tenth of the learning rate. Neither the step number nor the random state goes back."""
        path, state = processes.from_rank0(checkpoints.read_newest)
        if state is None:
            for name in self.networks:
                self._reinitialize(name, self.seed)
        else:
            coarse, fine = self.networks['coarse'], self.networks.get('fine')
            restore(path, state, {'network_fn': coarse, 'network_fine': fine, 'optimizer': self.optimizer,
                                  'renderer': self.renderer})
        self.returns, self.bad_in_a_row = self.returns + 1, 0
        self.say(f'{BAD_STEPS} steps in a row were not finite: back to the networks of {path or "the start"}, '
                 'with a tenth of the learning rate')

    # --- networks that collapsed ---

    def restart_collapsed(self, step, measures):
        """Reinitialise networks that show nothing but the background, after `step`."""
        if not self.restart:
            return
        for name, watch in self.watches.items():
            if name not in measures.losses:  # a renderer that does not show this network
                continue
            collapsed = watch.update(measures.losses[name], measures.opacities[name], measures.background)
            if collapsed and watch.restarts < MAX_RESTARTS:
                self.restarts += 1
                seed = derive_seed(self.seed, step, self.restarts)
                self._reinitialize(name, seed)
                watch.network_restarted()
                self.say(f'step {step}: the {name} network shows nothing but the background; '
                         f'it starts again with seed {seed}')

    def _reinitialize(self, name, seed):
        """Draw new parameters of a network from `seed`, and drop their history in the optimizer. The random state
        of the run stays as it is."""
        parameters = list(self.networks[name].parameters())
        with torch.random.fork_rng(devices={parameter.device for parameter in parameters if parameter.is_cuda}):
            torch.manual_seed(seed)
            self.networks[name].reset_parameters()
        if self.renderer is not None:
            self.renderer.reset_parameters()
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)
