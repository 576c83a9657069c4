"""One run by many processes: `torchrun --nproc_per_node=N run_nerf.py …`.

Every process, a rank, has the whole scene and the same networks. Each draws its own share of a step's rays; after backward
the gradients are averaged, so that all ranks make the same update. The first rank writes whatever is written; frames are
rendered by all. Without torchrun there is one rank, and nothing here does anything.
"""
import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist

from errors import UserError, first_line

PATIENCE = datetime.timedelta(days=7)
WAIT_SECONDS = 5.0  # so long a rank gives the one before it to save what a lost run has


class RankLost(Exception):
    """Another process of the run has ended."""


@contextlib.contextmanager
def heard(problem='another process of this run has ended'):
    """What torch says where another process is gone, as `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f'{problem} ({first_line(error)})') from None


class Ranks:
    """This process among those of its run.

        with Ranks() as ranks:
            …
            with ranks.until_lost(say):     # a rank that dies ends this block, for all
                for step in …:
                    …backward…
                    ranks.average(parameters, measures)

    Args:
      size: 1 for a process on its own; else what torchrun's environment says.
    Attributes:
      index, size: number of this process, from 0; how many there are.
      first: whether it is the one that writes.
      lost: whether another one has ended before its time.
      stopping: whether any of them was asked to stop, as all know after `average`.
    """

    def __init__(self, size=None):
        self.size = int(os.environ.get('WORLD_SIZE', 1)) if size is None else size
        self.index = int(os.environ.get('RANK', 0)) if self.size > 1 else 0
        self.first, self.control = self.index == 0, None
        self.lost = self.stopping = self.together = False

    def __enter__(self):
        if self.size > 1:
            with heard('the processes of this run do not reach one another'):
                # a process that is gone is known by its closed connection, not by a long silence
                dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo', timeout=PATIENCE)
                self.control = dist.new_group(backend='gloo', timeout=PATIENCE)
        return self

    def __exit__(self, *_):
        # NCCL's way out waits for the others: a process that leaves alone does not take it, its end tells them
        if self.size > 1 and (self.together or not torch.cuda.is_available()):
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def leave(self):
        """To be called where all processes end together."""
        self.together = not self.lost

    def share(self, count):
        """How many of a step's `count` rays are drawn here.

        Raises:
          UserError: fewer rays than processes.
        """
        if count < self.size:
            raise UserError(f'--N_rand: found {count}, expected at least one ray for each of the {self.size} processes')
        return count // self.size + (self.index < count % self.size)

    def part_ways(self, seed, step):
        """From here on, each rank's random numbers are its own. The first keeps those of a run with one process."""
        if not self.first:
            torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + self.index) % 2 ** 63)

    def average(self, parameters, measures, weight, stop):
        """The mean over the ranks' rays of gradients and scalars, in place; and whether to stop.

        Args:
          parameters: their `grad` is averaged.
          measures: scalar tensors.
          weight: the share of the step's rays that are here.
          stop: true if this process was asked to stop: `stopping` is true then in all.
        Raises:
          RankLost: another process is gone; nothing has changed.
        """
        self.stopping = bool(stop)
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parts = [*(parameter.grad for parameter in parameters), *measures]
        flat = torch.cat([part.flatten() for part in parts]) * weight
        asked = torch.tensor([int(self.stopping)])
        with heard():
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX, self.control)  # fails if a rank is gone, for which NCCL would wait
            dist.all_reduce(flat)
        self.stopping = bool(asked)
        for part, mean in zip(parts, flat.split([part.numel() for part in parts])):
            part.copy_(mean.view_as(part))

    def from_first(self, make):
        """`make()` of the first rank, on all. A `UserError` there is raised on all."""
        if self.size == 1:
            return make()
        box = [None]
        if self.first:
            try:
                box = [make()]
            except UserError as error:
                box = [error]
        with heard():
            dist.broadcast_object_list(box, 0, self.control)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def first_before_others(self, make):
        """`make()` on all ranks, on the first before the others: it may leave files that they find. Returns its own result.
        A `UserError` of the first is raised on all."""
        made = [None]

        def make_here():
            made[0] = make()
        self.from_first(make_here)
        return made[0] if self.first else make()

    # --- rendering: the first rank hands out frames, the others serve ---

    def each(self, render, poses, *about):
        """`render(pose, *about)` for up to `size` poses, each by another rank; the results in order. For the first rank,
        while the others `serve`."""
        if self.size == 1:
            return [render(pose, *about) for pose in poses]
        with heard():
            dist.broadcast_object_list([(poses, about)], 0, self.control)
        return self._gather(render, poses, about)

    def serve(self, render):
        """Render what the first rank hands out, until it calls `release`."""
        while True:
            box = [None]
            with heard():
                dist.broadcast_object_list(box, 0, self.control)
            if box[0] is None:
                return
            self._gather(render, *box[0])

    def release(self):
        """The others need not serve any longer."""
        if self.size > 1:
            with heard():
                dist.broadcast_object_list([None], 0, self.control)

    def _gather(self, render, poses, about):
        try:
            result = render(poses[self.index], *about) if self.index < len(poses) else None
        except Exception as error:  # raised by the first rank, which knows what depends on the frame
            result = error
        results = [None] * self.size if self.first else None
        with heard():
            dist.gather_object(result, results, 0, self.control)
        for result in results or ():
            if isinstance(result, Exception):
                raise result
        return results and results[:len(poses)]

    # --- when one is to stop, or gone ---

    def end_now(self, stop):
        """Whether this process leaves after this step: alone at once; one of several when all do, or when what it did for
        them was interrupted."""
        return bool(self.stopping or stop.interrupted or (stop.signal and self.size == 1))

    @contextlib.contextmanager
    def until_lost(self, say, stop):
        """Ends the block where another process has ended, and says so, unless a `StopRequest` has come for all."""
        try:
            yield
        except RankLost as error:
            self.lost = True
            if not stop.signal:
                say(f'{error}; this run ends')

    def should_save(self, path):
        """Whether this rank is the one to save a run that was lost: the first, or another, if none before it does."""
        if self.first or path.exists():
            return self.first
        deadline = time.monotonic() + WAIT_SECONDS * self.index
        while time.monotonic() < deadline and not path.exists():
            time.sleep(0.1)
        return not path.exists()
