"""The optimizer, and its learning rate."""
import torch


def adam(parameters, lrate, options):
    """Adam with `options`; on a GPU in one pass over all parameters, also after the state of a run on a CPU
    has been loaded."""
    options = {'fused': parameters[0].is_cuda, **options}
    optimizer = torch.optim.Adam(parameters, lr=lrate, **options)

    def keep_implementation(_, state):
        groups = [{**group, 'fused': options['fused'], 'foreach': None} for group in state['param_groups']]
        return {**state, 'param_groups': groups}
    optimizer.register_load_state_dict_pre_hook(keep_implementation)
    return optimizer


def set_learning_rate(optimizer, lrate, lrate_decay, step):
    """Set the rate of step `step` ≥ 1, which falls to a tenth in 1000 · lrate_decay steps; returns it."""
    lrate = lrate * 0.1 ** ((step - 1) / (1000 * lrate_decay))
    for group in optimizer.param_groups:
        group['lr'] = lrate
    return lrate
