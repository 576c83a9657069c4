"""Safeguards without training: sums over parts of a step, collapsed networks, steps that are not finite."""
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_networks import encoded_nerf

from accel.proposals import ProposalRenderer
from run_nerf_helpers import get_embedder
from training.processes import Processes
from training.safeguards import (
    BLANK_WINDOWS,
    FLAT_WINDOWS,
    MAX_BAD_STEPS,
    MAX_RESTARTS,
    WINDOW_STEPS,
    CollapseWatch,
    Measures,
    Safeguards,
    TrainingFailed,
)

# The mean squared error of an image that shows only the background.
BACKGROUND = 0.2


def measures_of(loss=0.1, opacity=0.5):
    measures = Measures()
    losses = {name: torch.tensor(loss, requires_grad=True) for name in ('coarse', 'fine')}
    opacities = {name: torch.tensor(opacity) for name in ('coarse', 'fine')}
    measures.add(1.0, losses, losses, opacities, torch.tensor(BACKGROUND))
    return measures


class Problem:
    """Two networks of one layer after a step of Adam, and what their safeguards say."""

    def __init__(self, restart=True, **followers):
        torch.manual_seed(0)
        self.networks = {name: torch.nn.Linear(3, 4) for name in ('coarse', 'fine')}
        self.parameters = [p for network in self.networks.values() for p in network.parameters()]
        self.optimizer, self.lines = torch.optim.Adam(self.parameters, lr=0.1), []
        self.safeguards = Safeguards(self.networks, self.optimizer, 0, restart, self.lines.append, followers)
        self.update()

    def update(self, gradient=1.0):
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        if self.safeguards.all_finite(measures_of()):
            self.optimizer.step()

    def weights(self):
        return [parameter.detach().clone() for parameter in self.parameters]

    def checkpoint(self):
        return copy.deepcopy({f'network_{key}_state_dict': self.networks[name].state_dict()
                              for key, name in (('fn', 'coarse'), ('fine', 'fine'))}
                             | {'optimizer_state_dict': self.optimizer.state_dict()})


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- measures -----------------------------------------------------------------------------------------------

def test_measures_of_parts_are_those_of_the_whole():
    values, counts = torch.rand(10, 2, requires_grad=True), torch.rand(10)
    whole, parts = Measures(), Measures()
    for measures, sizes in ((whole, [10]), (parts, [3, 7])):
        for error, count in zip(values.split(sizes), counts.split(sizes)):
            losses = {'coarse': error[:, 0].mean(), 'distortion': error[:, 1].mean()}
            errors, opacities = {'coarse': error[:, 0].mean()}, {'coarse': count.mean()}
            measures.add(len(error) / 10, losses, errors, opacities, error.mean(), count.mean())
    torch.testing.assert_close(parts.tensors(), whole.tensors())
    torch.testing.assert_close(whole.total, values.mean(0).sum().detach())
    assert len(whole.tensors()) == 6 and not any(tensor.requires_grad for tensor in parts.tensors())


def test_a_term_of_the_loss_may_be_a_plain_number():
    measures = Measures()
    measures.add(0.5, {'coarse': torch.tensor(2.0), 'off': 0.0}, {}, {}, torch.tensor(1.0))
    assert measures.total == 1 and all(torch.is_tensor(value) for value in measures.tensors())


def test_measures_are_averaged_in_place():
    measures = measures_of()
    for tensor in measures.tensors():
        tensor.copy_(torch.tensor(3.0))
    assert measures.total == 6 and measures.opacities['fine'] == 3 and measures.background == 3


# --- collapsed networks -------------------------------------------------------------------------------------

def windows_until_collapsed(watch, loss, opacity, background=BACKGROUND, windows=20):
    """Windows until `watch` reports a collapse, or None; loss and opacity are functions of the window."""
    for window in range(windows):
        for _ in range(WINDOW_STEPS):
            if watch.update(torch.tensor(loss(window)), torch.tensor(opacity(window)),
                            torch.tensor(background)):
                return window + 1
    return None


@pytest.mark.parametrize('ratio, opacity, expected', [
    (1.0, 0.0, BLANK_WINDOWS),    # transparent everywhere
    (1.0, 0.3, FLAT_WINDOWS + 1),  # fog, no better than the background: the first window counts as progress
    (0.9, 0.3, None),             # better than the background
    (0.5, 0.0, None),
])
def test_a_network_collapses_if_it_is_no_better_than_the_background(ratio, opacity, expected):
    found = windows_until_collapsed(CollapseWatch(), lambda _: ratio * BACKGROUND, lambda _: opacity)
    assert found == expected


def test_slow_progress_is_not_collapse():
    """No better than the background for long, but improving."""
    watch = CollapseWatch()
    assert windows_until_collapsed(watch, lambda window: (1.2 - 0.01 * window) * BACKGROUND,
                                   lambda _: 0.2) is None


def test_a_small_object_in_a_large_image_is_not_blank():
    found = windows_until_collapsed(CollapseWatch(), lambda _: 0.99 * BACKGROUND, lambda _: 2e-4)
    assert found is None or found > BLANK_WINDOWS


def test_windows_of_the_background_alone_are_not_judged():
    watch = CollapseWatch()
    assert windows_until_collapsed(watch, lambda _: 5e-5, lambda _: 0.0, background=5e-5) is None
    # nor do they count as progress, against which later windows would be judged
    assert windows_until_collapsed(watch, lambda window: (1.2 - 0.01 * window) * BACKGROUND,
                                   lambda _: 0.2) is None


def test_steps_that_are_not_finite_do_not_hide_a_collapse():
    watch, nan = CollapseWatch(), torch.tensor(float('nan'))
    opacity, background = torch.tensor(0.0), torch.tensor(BACKGROUND)
    collapsed = [watch.update(background if step % 10 else nan, opacity, background)
                 for step in range(BLANK_WINDOWS * WINDOW_STEPS)]
    assert collapsed.index(True) == len(collapsed) - 1


def test_windows_without_a_finite_step_are_not_judged():
    watch, nan = CollapseWatch(), torch.tensor(float('nan'))
    assert not any(watch.update(nan, nan, nan) for _ in range(2 * FLAT_WINDOWS * WINDOW_STEPS))


def test_a_resumed_watch_decides_at_the_same_step():
    def steps_until_collapsed(watch):
        scalars = torch.tensor(BACKGROUND), torch.tensor(0.0), torch.tensor(BACKGROUND)
        return next(step for step in range(10 * WINDOW_STEPS) if watch.update(*scalars))
    resumed, watch = CollapseWatch(), CollapseWatch()
    for _ in range(WINDOW_STEPS + 30):
        watch.update(torch.tensor(BACKGROUND), torch.tensor(0.0), torch.tensor(BACKGROUND))
    resumed.load_state_dict(copy.deepcopy(watch.state_dict()))
    assert steps_until_collapsed(resumed) == steps_until_collapsed(watch) == WINDOW_STEPS - 31


def collapse(problem, steps=BLANK_WINDOWS * WINDOW_STEPS):
    measures = measures_of(BACKGROUND, 0.3)
    measures.opacities['fine'].zero_()
    for step in range(1, steps + 1):
        problem.safeguards.recover(step, measures, None, Processes(1))


def test_a_collapsed_network_starts_again_alone():
    problem = Problem()
    before, random_state = problem.weights(), torch.get_rng_state()
    collapse(problem)
    after = problem.weights()
    assert equal(after[:2], before[:2]) and not any(torch.equal(a, b) for a, b in zip(after[2:], before[2:]))
    assert problem.safeguards.restarts == 1 and torch.equal(torch.get_rng_state(), random_state)
    assert set(problem.optimizer.state) == set(problem.networks['coarse'].parameters())
    (line,) = problem.lines
    assert 'the fine network shows nothing but the background; it starts again with seed' in line
    again = Problem()
    torch.rand(5)  # all processes draw the same parameters, whatever their random state
    collapse(again)
    assert equal(again.weights(), after)


def test_what_is_reset_with_a_network_starts_again_in_the_optimizer_too():
    renderer = ProposalRenderer()
    problem = Problem(renderer=renderer)
    problem.optimizer.add_param_group({'params': [*renderer.parameters()]})
    problem.parameters += renderer.parameters()
    problem.update()
    collapse(problem)
    assert not any(parameter.any() for parameter in renderer.parameters())
    problem.update()
    steps = [problem.optimizer.state[parameter]['step'].item() for parameter in problem.parameters]
    assert steps == [3, 3, 1, 1, 1, 1], 'of the coarse network, of the fine one, of the grids'


def test_a_scaled_loss_is_not_judged_but_the_error(monkeypatch):
    """A network is no better than the background, whatever weight its term of the loss has."""
    problem, measures = Problem(), measures_of(BACKGROUND, 0.0)
    measures.losses = {'coarse': torch.tensor(0.1 * BACKGROUND), 'fine': torch.tensor(0.1 * BACKGROUND)}
    for step in range(BLANK_WINDOWS * WINDOW_STEPS):
        problem.safeguards.restart_collapsed(step, measures)
    assert problem.safeguards.restarts == 2


def test_a_network_that_cannot_be_reinitialised_is_an_error_at_the_start():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
    network = encoded_nerf(encoding=get_embedder(4)[0])
    network.views_linears.append(Layer())
    optimizer = torch.optim.Adam(network.parameters())
    with pytest.raises(AttributeError, match='reset_parameters'):
        Safeguards({'coarse': network}, optimizer, 0, True, print)
    Safeguards({'coarse': network}, optimizer, 0, False, print)


def test_restarts_end(monkeypatch):
    monkeypatch.setattr(CollapseWatch, 'update', lambda *_: True)
    problem = Problem()
    collapse(problem, 10)
    assert problem.safeguards.restarts == len(problem.lines) == 2 * MAX_RESTARTS


def test_no_restart_leaves_networks_alone():
    problem = Problem(restart=False)
    before = problem.weights()
    collapse(problem)
    assert equal(problem.weights(), before) and problem.lines == []


# --- steps that are not finite ------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_step_that_is_not_finite_is_skipped(bad):
    problem = Problem()
    before = problem.weights()
    problem.update(gradient=bad)
    assert equal(problem.weights(), before) and not problem.safeguards.is_healthy()
    assert problem.safeguards.bad_steps == 1 and 'not finite' in problem.lines[0]
    problem.update()
    assert problem.safeguards.is_healthy() and problem.safeguards.bad_steps == 1
    assert not problem.safeguards.all_finite(measures_of(loss=bad))


def bad_steps(problem, count=MAX_BAD_STEPS):
    for _ in range(count):
        problem.update(gradient=float('nan'))


def test_training_rolls_back_to_the_newest_checkpoint():
    problem = Problem()
    saved, state = problem.weights(), problem.checkpoint()
    problem.update()
    checkpoints = SimpleNamespace(read_newest=lambda: ('000001.tar', state))
    bad_steps(problem, MAX_BAD_STEPS - 1)
    problem.safeguards.recover(1, measures_of(), checkpoints, Processes(1))
    assert problem.safeguards.rollbacks == 0 and problem.safeguards.lrate_scale == 1
    bad_steps(problem, 1)
    problem.safeguards.recover(1, measures_of(), checkpoints, Processes(1))
    assert problem.safeguards.rollbacks == 1
    assert equal(problem.weights(), saved) and '000001.tar' in problem.lines[-1]
    assert {entry['step'].item() for entry in problem.optimizer.state.values()} == {1}
    assert problem.safeguards.is_healthy() and problem.safeguards.lrate_scale == pytest.approx(0.1)


def test_without_a_checkpoint_training_starts_with_new_networks():
    resets = []
    followers = {name: SimpleNamespace(reset=partial(resets.append, name))
                 for name in ('renderer', 'ray_sampler')}
    problem = Problem(**followers)
    before = problem.weights()
    bad_steps(problem)
    problem.safeguards.roll_back(SimpleNamespace(read_newest=lambda: (None, None)), Processes(1))
    assert not any(torch.equal(a, b) for a, b in zip(problem.weights(), before))
    assert not problem.optimizer.state and set(resets) == followers.keys()
    assert 'back to new networks' in problem.lines[-1]


def test_training_fails_if_rolling_back_does_not_help():
    problem = Problem()
    state = problem.checkpoint()
    bad_steps(problem)
    problem.safeguards.roll_back(SimpleNamespace(read_newest=lambda: ('000001.tar', state)), Processes(1))
    with pytest.raises(TrainingFailed, match='--lrate'):
        bad_steps(problem)


def test_state_of_safeguards():
    problem, other = Problem(), Problem()
    bad_steps(problem, 3)
    collapse(problem)
    other.safeguards.load_state_dict(copy.deepcopy(problem.safeguards.state_dict()))
    assert vars(other.safeguards)['bad_steps'] == 3 and other.safeguards.restarts == 1
    assert other.safeguards.watches['fine'].restarts == 1 and not other.safeguards.is_healthy()
