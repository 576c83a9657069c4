"""The small network behind a hash encoding."""
import pytest
import torch
from tiny_networks import hash_nerf, points_and_directions


@pytest.mark.parametrize('use_viewdirs', [True, False])
def test_density_is_that_of_forward(use_viewdirs):
    torch.manual_seed(0)
    network = hash_nerf(use_viewdirs)
    points, viewdirs = points_and_directions(50, use_viewdirs)
    raw = network(points, viewdirs)
    assert raw.shape == (50, 4) and torch.equal(network.density(points), raw[:, 3])
    assert torch.equal(raw[:, 3].relu(), raw[:, 3]), 'the ReLU in raw2outputs changes nothing'


def test_density_does_not_depend_on_the_direction():
    network, (points, viewdirs) = hash_nerf(), points_and_directions(50)
    one, other = network(points, viewdirs), network(points, -viewdirs)
    assert torch.equal(one[:, 3], other[:, 3]) and not torch.equal(one[:, :3], other[:, :3])


def test_the_table_is_a_parameter_of_the_network():
    network = hash_nerf()
    assert 'encoding.table' in dict(network.named_parameters()) and 'encoding.table' in network.state_dict()
    assert 'encoding.aabb' in network.state_dict()
    network(*points_and_directions(50)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(value.device.type == 'meta' for value in network.to('meta').state_dict().values())


def test_reset_parameters_initialises_everything_but_the_box():
    torch.manual_seed(0)
    network = hash_nerf()
    network.encoding.set_aabb([[-2.0, -2, -2], [2, 2, 2]])
    first = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    network.reset_parameters()
    assert all((parameter != first[name]).any() for name, parameter in network.named_parameters())
    assert network.encoding.table.abs().max() <= 1e-4 and network.encoding.aabb[1].tolist() == [2, 2, 2]
    torch.manual_seed(0)
    network.reset_parameters()
    for name, parameter in network.named_parameters():
        assert parameter.equal(first[name]), 'like a new network'
