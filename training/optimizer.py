"""The optimizer, and its learning rate."""
import torch


def adam(parameters, lrate, options, poses=None, lrate_poses=0.):
    """Adam with `options`; on a GPU in one pass over all parameters, also after the state of a run on a CPU
    has been loaded. Those of the module `poses` are a group of their own, with the rate `lrate_poses` and
    Adam's default options: with a tiny eps the noise of rarely seen views would move them."""
    options = {'fused': parameters[0].is_cuda, **options}
    of_poses, rate = [] if poses is None else [*poses.parameters()], {'lrate_scale': lrate_poses / lrate}
    groups = [{'params': [parameter for parameter in parameters if parameter not in {*of_poses}]}]
    if of_poses:
        groups.append({'params': of_poses, 'betas': (0.9, 0.999), 'eps': 1e-8, **rate})
    optimizer = torch.optim.Adam(groups, lr=lrate, **options)

    def keep_implementation_and_rate(_, state):
        groups = [{**group, 'fused': options['fused'], 'foreach': None} for group in state['param_groups']]
        return {**state, 'param_groups': groups[:1] + [{**group, **rate} for group in groups[1:]]}
    optimizer.register_load_state_dict_pre_hook(keep_implementation_and_rate)
    return optimizer


def set_learning_rate(optimizer, lrate, lrate_decay, step):
    """Set the rate of step `step` ≥ 1, which falls to a tenth in 1000 · lrate_decay steps; returns it. A
    group with a `lrate_scale` has that many times the rate."""
    lrate = lrate * 0.1 ** ((step - 1) / (1000 * lrate_decay))
    for group in optimizer.param_groups:
        group['lr'] = lrate * group.get('lrate_scale', 1)
    return lrate
