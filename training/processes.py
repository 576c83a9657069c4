"""One run in several processes: `torchrun --nproc_per_node=N run_nerf.py ...`.

Every process (rank) has the whole scene and the same networks, and draws its part of each step's rays.
Gradients are averaged after the backward pass, so that all ranks make the same update. Rank 0 writes all
files; frames are rendered by all ranks. Without torchrun there is a single rank, and these functions cost
nothing.
"""
import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist

from scenes.errors import UserError, first_line
from training.signals import Stopped

# A dead process is noticed by its closed connection, so the timeout only has to outlast the slowest rank.
TIMEOUT = datetime.timedelta(days=7)
# After a process is lost, each rank gives the rank before it this many seconds to save the run.
SAVE_SECONDS = 5.0


class ProcessLost(Exception):
    """Another process of the run has ended unexpectedly."""


def derive_seed(seed, step, index):
    """A random seed, different for each seed of a run, step, and index of what it is for."""
    return ((seed * 1_000_003 + step) * 1_009 + index) % 2 ** 63


class Processes:
    """This process among those of its run.

        with Processes() as processes:
            for step in ...:
                ...  # backward pass
                processes.average(parameters, tensors, rank_share)

    Args:
      size: number of processes; taken from torchrun's environment by default.
    Attributes:
      size: number of processes.
      rank: number of this process, from 0.
      is_main: whether this is rank 0, which writes files and evaluates.
      lost: whether another process has ended unexpectedly.
    """

    def __init__(self, size=None):
        self.size = int(os.environ.get('WORLD_SIZE', 1)) if size is None else size
        self.rank = int(os.environ.get('RANK', 0)) if self.size > 1 else 0
        self.is_main, self.lost, self.control = self.rank == 0, False, None

    def __enter__(self):
        if self.size > 1:
            with self._detect_loss('the processes of this run cannot reach each other'):
                backend = 'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo'
                dist.init_process_group(backend, timeout=TIMEOUT)
                self.control = dist.new_group(backend='gloo', timeout=TIMEOUT)
        return self

    def __exit__(self, exception_type, *_):
        # a group that is still referenced keeps threads, which may crash the exit of Python
        self.control = None
        # NCCL waits for all ranks here, so a rank that leaves on its own skips it
        leaves_early = self.lost or exception_type is not None
        if self.size > 1 and not (leaves_early and torch.cuda.is_available()):
            # its threads need the GIL to free their last tensors, but torch 2.6 holds it while it joins them
            time.sleep(0.1)
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    @contextlib.contextmanager
    def _detect_loss(self, problem='another process of this run has ended'):
        """Turn the error of a collective operation into `ProcessLost`."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # a ValueError if torchrun's variables are incomplete
            self.lost = True
            raise ProcessLost(f'{problem} ({first_line(error)})') from None

    # --- training ---

    def own_rays(self, N_rand):
        """How many of a step's `N_rand` rays this process draws.

        Raises:
          UserError: fewer rays than processes.
        """
        if N_rand < self.size:
            raise UserError(f'--N_rand: found {N_rand}, '
                            f'expected at least one ray for each of the {self.size} processes')
        return N_rand // self.size + (self.rank < N_rand % self.size)

    def seed_per_rank(self, seed, step):
        """Give each rank its own random numbers after `step`; rank 0 keeps those of a run with one
        process."""
        if not self.is_main:
            torch.manual_seed(derive_seed(seed, step, self.rank))

    def average(self, parameters, tensors, rank_share):
        """Replace gradients and tensors by their weighted means over the ranks, in place.

        Args:
          parameters: the `grad` of those that require one is averaged; a missing one counts as zero.
          tensors: function that returns scalar tensors.
          rank_share: this process's fraction of the step's rays.
        Raises:
          ProcessLost: another process has ended; nothing has been averaged.
        """
        if self.size == 1:
            return
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts = [*(parameter.grad for parameter in parameters), *tensors()]
        flat = torch.cat([part.flatten() for part in parts]) * rank_share
        if flat.is_cuda:  # NCCL would wait for a lost process forever, the control group notices it
            torch.cuda.synchronize(flat.device)
            self.any(False)
        with self._detect_loss():
            dist.all_reduce(flat)
        for part, mean in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(mean.view_as(part))

    def any(self, flag):
        """Whether `flag` is true in any process. All ranks call it together.

        Raises:
          ProcessLost: another process has ended.
        """
        if self.size == 1:
            return bool(flag)
        result = torch.tensor([int(flag)])
        with self._detect_loss():
            dist.all_reduce(result, dist.ReduceOp.MAX, self.control)
        return bool(result)

    # --- rank 0 before the others, or for them ---

    def from_rank0(self, make):
        """The result of `make()` on rank 0, in all processes. A `UserError` of it is raised in all of
        them."""
        if self.size == 1:
            return make()
        box = [None]
        if self.is_main:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        with self._detect_loss():
            dist.broadcast_object_list(box, 0, self.control)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def run_rank0_first(self, make):
        """`make()` in all processes, in rank 0 before the others because it may create files that they read.
        Returns each process's own result. A `UserError` of rank 0 is raised in all of them."""
        own = []
        self.from_rank0(lambda: own.append(make()))
        return own[0] if self.is_main else make()

    def should_save(self, path):
        """After a process is lost: whether this one, which is not rank 0, is to save the run's checkpoint
        `path`. It is if no lower rank has saved it in the time that those ranks have."""
        deadline = time.monotonic() + SAVE_SECONDS * self.rank
        while time.monotonic() < deadline and not path.exists():
            time.sleep(0.1)
        return not path.exists()

    # --- rendering: rank 0 hands out frames, the others serve ---

    def render_all(self, render, poses):
        """Called by rank 0 while the others `serve`: `render(pose)` for up to `size` poses, each in its own
        process. Returns the results in order. Errors and `Stopped` of any process are raised here."""
        if self.size == 1:
            return [render(pose) for pose in poses]
        with self._detect_loss():
            dist.broadcast_object_list([poses], 0, self.control)
        return self._render_and_gather(render, poses)

    def serve(self, render):
        """Render the frames that rank 0 hands out until it calls `release`."""
        while True:
            box = [None]
            with self._detect_loss():
                dist.broadcast_object_list(box, 0, self.control)
            if box[0] is None:
                return
            self._render_and_gather(render, box[0])

    def release(self):
        """Called by rank 0: end `serve` in the other processes."""
        if self.size > 1 and not self.lost:
            with self._detect_loss():
                dist.broadcast_object_list([None], 0, self.control)

    def _render_and_gather(self, render, poses):
        try:
            result = render(poses[self.rank]) if self.rank < len(poses) else None
        except (Exception, Stopped) as error:  # raised on rank 0, which knows what needs the frame
            result = error
        results = [None] * self.size if self.is_main else None
        with self._detect_loss():
            dist.gather_object(result, results, 0, self.control)
        if not self.is_main:
            return None
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results[:len(poses)]
