"""Safeguards without training: sums over parts of a step, collapsed networks, steps that are not finite."""
import copy
from types import SimpleNamespace

import pytest
import torch

from training.processes import Processes
from training.safeguards import (
    BAD_STEPS,
    BLANK_WINDOWS,
    FLAT_WINDOWS,
    MAX_RESTARTS,
    WINDOW,
    CollapseWatch,
    Measures,
    Safeguards,
    TrainingFailed,
)

BACKGROUND = 0.2  # colour loss of an empty picture


def measures_of(loss=0.1, opacity=0.5):
    measures = Measures()
    losses = {name: torch.tensor(loss, requires_grad=True) for name in ('coarse', 'fine')}
    opacities = {name: torch.tensor(opacity) for name in ('coarse', 'fine')}
    measures.add(1.0, losses, opacities, torch.tensor(BACKGROUND))
    return measures


class Problem:
    """Two networks of one layer after a step of Adam, and what their safeguards say."""

    def __init__(self, restart=True, renderer=None):
        torch.manual_seed(0)
        self.networks = {name: torch.nn.Linear(3, 4) for name in ('coarse', 'fine')}
        self.parameters = [p for network in self.networks.values() for p in network.parameters()]
        self.optimizer, self.lines = torch.optim.Adam(self.parameters, lr=0.1), []
        self.safeguards = Safeguards(self.networks, self.optimizer, 0, restart, self.lines.append, renderer)
        self.update()

    def update(self, gradient=1.0):
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        if self.safeguards.finite(measures_of()):
            self.optimizer.step()

    def weights(self):
        return [parameter.detach().clone() for parameter in self.parameters]

    def checkpoint(self):
        return copy.deepcopy({f'network_{key}_state_dict': self.networks[name].state_dict()
                              for key, name in (('fn', 'coarse'), ('fine', 'fine'))}
                             | {'optimizer_state_dict': self.optimizer.state_dict()})


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- measures ---------------------------------------------------------------------------------------------------

def test_measures_of_parts_are_those_of_the_whole():
    errors, counts = torch.rand(10, 2, requires_grad=True), torch.rand(10)
    whole, parts = Measures(), Measures()
    for measures, sizes in ((whole, [10]), (parts, [3, 7])):
        for error, count in zip(errors.split(sizes), counts.split(sizes)):
            losses = {'coarse': error[:, 0].mean(), 'distortion': error[:, 1].mean()}
            opacities = {'coarse': count.mean()}
            measures.add(len(error) / 10, losses, opacities, error.mean(), count.mean())
    torch.testing.assert_close(parts.tensors(), whole.tensors())
    torch.testing.assert_close(whole.total, errors.mean(0).sum().detach())
    assert len(whole.tensors()) == 5 and not any(tensor.requires_grad for tensor in parts.tensors())


def test_measures_are_averaged_in_place():
    measures = measures_of()
    for tensor in measures.tensors():
        tensor.copy_(torch.tensor(3.0))
    assert measures.total == 6 and measures.opacities['fine'] == 3 and measures.background == 3


# --- collapsed networks -----------------------------------------------------------------------------------------

def windows_until_collapsed(watch, loss, opacity, background=BACKGROUND, windows=20):
    """Windows until `watch` reports a collapse, or None; loss and opacity are functions of the window."""
    for window in range(windows):
        for _ in range(WINDOW):
            if watch.update(torch.tensor(loss(window)), torch.tensor(opacity(window)), torch.tensor(background)):
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
    assert windows_until_collapsed(watch, lambda window: (1.2 - 0.01 * window) * BACKGROUND, lambda _: 0.2) is None


def test_a_small_object_in_a_large_picture_is_not_blank():
    found = windows_until_collapsed(CollapseWatch(), lambda _: 0.99 * BACKGROUND, lambda _: 2e-4)
    assert found is None or found > BLANK_WINDOWS


def test_images_of_the_background_alone_are_not_judged():
    assert windows_until_collapsed(CollapseWatch(), lambda _: 5e-5, lambda _: 0.0, background=5e-5) is None


def test_steps_that_are_not_finite_do_not_hide_a_collapse():
    watch, nan = CollapseWatch(), float('nan')
    watch.update(torch.tensor(nan), torch.tensor(0.0), torch.tensor(BACKGROUND))
    assert windows_until_collapsed(watch, lambda _: BACKGROUND, lambda _: 0.0) == BLANK_WINDOWS


def test_a_resumed_watch_decides_at_the_same_step():
    def steps_until_collapsed(watch):
        scalars = torch.tensor(BACKGROUND), torch.tensor(0.0), torch.tensor(BACKGROUND)
        return next(step for step in range(10 * WINDOW) if watch.update(*scalars))
    resumed, watch = CollapseWatch(), CollapseWatch()
    for _ in range(WINDOW + 30):
        watch.update(torch.tensor(BACKGROUND), torch.tensor(0.0), torch.tensor(BACKGROUND))
    resumed.load_state_dict(copy.deepcopy(watch.state_dict()))
    assert steps_until_collapsed(resumed) == steps_until_collapsed(watch) == WINDOW - 31


def collapse(problem, steps=BLANK_WINDOWS * WINDOW):
    measures = measures_of(BACKGROUND, 0.3)
    measures.opacities['fine'].zero_()
    for step in range(1, steps + 1):
        problem.safeguards.restart_collapsed(step, measures)


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


# --- steps that are not finite ----------------------------------------------------------------------------------

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_step_that_is_not_finite_is_skipped(bad):
    problem = Problem()
    before = problem.weights()
    problem.update(gradient=bad)
    assert equal(problem.weights(), before) and not problem.safeguards.healthy
    assert problem.safeguards.bad_steps == 1 and 'not finite' in problem.lines[0]
    problem.update()
    assert problem.safeguards.healthy and problem.safeguards.bad_steps == 1
    assert not problem.safeguards.finite(measures_of(loss=bad))


def bad_steps(problem, count=BAD_STEPS):
    for _ in range(count):
        problem.update(gradient=float('nan'))


def test_training_goes_back_to_the_newest_checkpoint():
    problem = Problem()
    saved, state = problem.weights(), problem.checkpoint()
    problem.update()
    bad_steps(problem, BAD_STEPS - 1)
    assert not problem.safeguards.must_go_back
    bad_steps(problem, 1)
    assert problem.safeguards.must_go_back and problem.safeguards.lrate_scale == 1
    problem.safeguards.go_back(SimpleNamespace(read_newest=lambda: ('000001.tar', state)), Processes(1))
    assert equal(problem.weights(), saved) and '000001.tar' in problem.lines[-1]
    assert {entry['step'].item() for entry in problem.optimizer.state.values()} == {1}
    assert problem.safeguards.healthy and problem.safeguards.lrate_scale == pytest.approx(0.1)


def test_without_a_checkpoint_training_goes_back_to_new_networks():
    resets = []
    problem = Problem(renderer=SimpleNamespace(reset_parameters=lambda: resets.append(1)))
    before = problem.weights()
    bad_steps(problem)
    problem.safeguards.go_back(SimpleNamespace(read_newest=lambda: (None, None)), Processes(1))
    assert not any(torch.equal(a, b) for a, b in zip(problem.weights(), before))
    assert not problem.optimizer.state and resets and 'back to the networks of the start' in problem.lines[-1]


def test_training_fails_if_going_back_does_not_help():
    problem = Problem()
    state = problem.checkpoint()
    bad_steps(problem)
    problem.safeguards.go_back(SimpleNamespace(read_newest=lambda: ('000001.tar', state)), Processes(1))
    with pytest.raises(TrainingFailed, match='--lrate'):
        bad_steps(problem)


def test_state_of_safeguards():
    problem, other = Problem(), Problem()
    bad_steps(problem, 3)
    collapse(problem)
    other.safeguards.load_state_dict(copy.deepcopy(problem.safeguards.state_dict()))
    assert vars(other.safeguards)['bad_steps'] == 3 and other.safeguards.restarts == 1
    assert other.safeguards.watches['fine'].restarts == 1 and not other.safeguards.healthy
