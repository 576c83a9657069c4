"""The options of `run_nerf.py`: names and defaults of the established code, and a few more.

A command line overrides the config file, switches included: `--no-half_res` turns off what a config turned on.
"""
import argparse
import io
import re
from pathlib import Path

import configargparse

BooleanSwitch = argparse.BooleanOptionalAction


def open_config(path, mode='r'):
    """Open a config file, refusing with an OSError what the parser would pass over: sections, repeated keys, `config`."""
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError:
        raise OSError('not a text file in UTF-8') from None
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.strip()[0] not in '#;']
    keys = [re.split(r'[\s=:]', line, maxsplit=1)[0] for line in lines]
    for key in keys:
        if key.startswith('[') or key == 'config' or keys.count(key) > 1:
            raise OSError(f'found {key!r}, expected each key once, no sections and no other config')
    file = io.StringIO(text)
    file.name = str(path)
    return file


class OneLineParser(configargparse.ArgumentParser):
    """Says what is wrong in one line, in place of the whole usage, and names the config file of an unknown key."""

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')

    def parse_args(self, *args, **kwargs):
        known, unknown = self.parse_known_args(*args, **kwargs)
        given = set()
        for source, settings in self.get_source_to_settings_dict().items():
            for key, (action, words) in settings.items():
                if source == 'command_line':
                    strings = {word.split('=')[0] for word in words if isinstance(word, str)}
                    given.update(action.dest for action in self._actions if strings & set(action.option_strings))
                elif source.startswith('config_file') and action is not None:
                    given.add(action.dest)
                elif source.startswith('config_file'):
                    self.error(f'{source.partition("|")[2]}: unknown key {key!r}; --help lists the options')
        if unknown:
            self.error(f'unknown option {" ".join(unknown)}; --help lists the options')
        self.check(known)
        known.given = frozenset(given)
        return known

    def check(self, args):
        """What no single option can check for itself."""
        if not args.expname and not (args.render_only and args.ft_path):  # that checkpoint knows its name
            self.error('no experiment: give --config FILE (configs/demo.txt is there) or --expname NAME')
        if args.N_importance > 0 and args.N_samples < 3:
            self.error(f'argument --N_samples: found {args.N_samples}, expected at least 3 with --N_importance')
        if args.occupancy_grid and args.N_importance > 0:
            self.error(f'argument --N_importance: found {args.N_importance}, expected 0 with --occupancy_grid, which takes '
                       'the place of the coarse network')
        if args.aabb is not None and not all(low < high for low, high in zip(args.aabb[:3], args.aabb[3:])):
            self.error(f'argument --aabb: found {" ".join(f"{x:g}" for x in args.aabb)}, expected X0 < X1, Y0 < Y1, Z0 < Z1')
        if args.near is not None and args.far is not None and args.near >= args.far:
            self.error(f'arguments --near, --far: found {args.near} and {args.far}, expected near < far')


def listed(args):
    """The options as sorted (name, value) pairs, without `given`, the names of those that were not left at their default."""
    return [(key, value) for key, value in sorted(vars(args).items()) if key != 'given']


def whole(least, most=2 ** 63 - 1):
    """An option type: a whole number from `least` to `most`."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f'found {text!r}, expected a whole number of at least {least}')
        return value
    return parse


def number(least=float('-inf'), above=float('-inf'), most=float('inf')):
    """An option type: a finite number with `least` <= number <= `most` and number > `above`."""
    limits = [f'{word} {limit:g}' for word, limit in (('at least', least), ('greater than', above), ('at most', most))
              if abs(limit) != float('inf')]
    expected = ' and '.join(limits)

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float('nan')
        if not (least <= value <= most and value > above and abs(value) != float('inf')):
            raise argparse.ArgumentTypeError(f'found {text!r}, expected a number {expected}'.rstrip())
        return value
    return parse


def config_parser():
    """The parser of all options; `parse_args` exits with code 2 and one line on anything it cannot use."""
    parser = OneLineParser(prog='run_nerf.py', description='Train a NeRF and render novel views.',
                           allow_abbrev=False, config_file_open_func=open_config,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for add_group in (_run_options, _data_options, _network_options, _training_options, _rendering_options,
                      _render_only_options, _logging_options):
        add_group(parser)
    return parser


def _run_options(parser):
    add = parser.add_argument_group('run').add_argument
    add('--config', is_config_file=True, metavar='FILE', help='config file: key = value lines, keys as the options')
    add('--expname', help='name of the experiment')
    add('--basedir', default='./logs/', help='outputs go to <basedir>/<expname>')
    add('--datadir', default='./data/llff/fern', help='folder of the scene')
    add('--seed', type=whole(0), default=0, help='seed of every random number')
    add('--device', default='auto', help='auto (CUDA where there is a GPU, else cpu), cpu, cuda, cuda:1, …')


def _data_options(parser):
    add = parser.add_argument_group('data').add_argument
    add('--dataset_type', choices=['llff', 'blender'], default='llff', help='layout of the scene on disk')
    add('--testskip', type=whole(0), default=8, help='blender: load every n-th image of val and test; 0 for all')
    add('--white_bkgd', action=BooleanSwitch, default=False, help='composite on white; else on black')
    add('--half_res', action=BooleanSwitch, default=False, help='blender: halve width and height')
    add('--factor', type=whole(0), default=8, help='llff: use images reduced by this factor; 0 or 1 for full size')
    add('--no_ndc', action=BooleanSwitch, default=False,
        help='llff: no normalised device coordinates (for scenes that are not forward-facing)')
    add('--lindisp', action=BooleanSwitch, default=False, help='sample evenly in disparity rather than depth (not in NDC)')
    add('--spherify', action=BooleanSwitch, default=False, help='llff: the cameras look inwards from all around')
    add('--llffhold', type=whole(0), default=8, help='llff and transforms.json: hold out every n-th image as test view')
    add('--near', type=number(least=0), help='distance of the first sample, in units of rays_d; from the data if not given')
    add('--far', type=number(above=0), help='distance of the last sample; from the data if not given')
    add('--aabb', type=number(), nargs=6, metavar=('X0', 'Y0', 'Z0', 'X1', 'Y1', 'Z1'),
        help='box of hash grids and occupancy grid, lower and upper corner, in NDC where rays are; else found from the data')
    add('--random_bkgd', action=BooleanSwitch, default=False,
        help='blender: train with all backgrounds, in the mean, rather than with one; the images need alpha')
    add('--pixel_centers', action=BooleanSwitch, default=False,
        help='rays through pixel centres rather than corners; a checkpoint remembers it')


def _network_options(parser):
    add = parser.add_argument_group('networks').add_argument
    add('--netdepth', type=whole(1), default=8, help='layers of the coarse network')
    add('--netwidth', type=whole(2), default=256, help='channels of a layer of the coarse network')
    add('--netdepth_fine', type=whole(1), default=8, help='layers of the fine network')
    add('--netwidth_fine', type=whole(2), default=256, help='channels of a layer of the fine network')
    add('--use_viewdirs', action=BooleanSwitch, default=False, help='let the colour depend on the view direction')
    add('--i_embed', type=int, choices=[1, 0, -1], default=0,
        help='encoding: 0 positional, 1 trained hash grids with small networks behind, -1 none')
    add('--i_embed_views', type=int, choices=[2, 0, -1], default=None,
        help='of directions: 0 positional, 2 spherical harmonics, -1 none; as --i_embed if not given, 2 with hash grids')
    add('--n_levels', type=whole(1, 64), default=16, help='hash grids: how many, each finer than the one before')
    add('--n_features', type=int, choices=[1, 2, 4, 8], default=2, help='hash grids: numbers of an entry')
    add('--log2_hashmap_size', type=whole(4, 28), default=19, help='hash grids: log2 of the entries of a grid, at most')
    add('--finest_res', type=whole(16, 2 ** 20), default=2048, help='hash grids: cells along a side of the finest')
    add('--multires', type=whole(1), default=10, help='frequencies of the encoding of positions')
    add('--multires_views', type=whole(1), default=4, help='frequencies of the encoding of directions')


def _training_options(parser):
    add = parser.add_argument_group('training').add_argument
    add('--N_iters', type=whole(1), default=200000, help='training steps')
    add('--N_rand', type=whole(1), default=32 * 32 * 4, help='rays of a step')
    add('--lrate', type=number(above=0), default=5e-4, help='learning rate at the start')
    add('--lrate_decay', type=whole(1), default=250, help='the learning rate falls to a tenth in so many thousand steps')
    add('--occupancy_grid', action=BooleanSwitch, default=False,
        help='one network, sampled in those cells of the box that hold something, in N_samples steps along its diagonal')
    add('--N_rand_samples', type=whole(1), default=2 ** 18,
        help='with --occupancy_grid: samples of a step, to which the number of rays is adapted; N_rand is the most rays')
    add('--no_batching', action=BooleanSwitch, default=False, help='draw the rays of a step from one image, not from all')
    add('--precrop_iters', type=whole(0), default=0, help='steps at the start that see the middle of the images only')
    add('--precrop_frac', type=number(above=0, most=1), default=.5, help='how much of the image that middle is')
    add('--precision', choices=['auto', 'fp32', 'tf32', 'bf16'], default='auto',
        help='of the networks\' matrix products; auto: bf16 where the device has it, else fp32')
    add('--backward', choices=['auto', 'sparse', 'plain'], default='auto',
        help='sparse: keep no activations, go back through samples with a gradient; plain: through all; auto: the cheaper')
    add('--no_reload', action=BooleanSwitch, default=False, help='start anew, whatever checkpoints are there')
    add('--no_restart', action=BooleanSwitch, default=False,
        help='leave a network as it is that shows nothing but the background')
    add('--ft_path', help='checkpoint to start from, in place of the newest of the experiment')


def _rendering_options(parser):
    add = parser.add_argument_group('rendering').add_argument
    add('--N_samples', type=whole(1), default=64, help='coarse samples a ray')
    add('--N_importance', type=whole(0), default=0, help='additional fine samples a ray')
    add('--perturb', type=number(least=0), default=1., help='0 for no jitter of the samples, 1 for jitter')
    add('--raw_noise_std', type=number(least=0), default=0., help='noise added to the density in training')
    add('--exact_render', action=BooleanSwitch, default=False,
        help='ask the networks for every sample of every ray, also where nothing can be seen; those with an '
             'occupancy grid are asked in its occupied cells in any case')
    add('--chunk', type=whole(1), default=1024 * 32, help='rays in one go; less if memory runs out')
    add('--netchunk', type=whole(1), default=1024 * 64, help='points through a network in one go; less if memory runs out')


def _render_only_options(parser):
    add = parser.add_argument_group('render only').add_argument
    add('--render_only', action=BooleanSwitch, default=False, help='no training: load the checkpoint and render the path')
    add('--render_test', action=BooleanSwitch, default=False, help='with --render_only: the test views in place of the path')
    add('--render_factor', type=whole(0), default=0,
        help='with --render_only: divide width and height by this, 4 or 8 for a quick preview')
    add('--render_poses', metavar='FILE', help='camera path of your own: .npy or .json with c2w matrices [N, 3 or 4, 4], '
             'in the coordinates of the scene as loaded')


def _logging_options(parser):
    add = parser.add_argument_group('logging, every so many steps').add_argument
    add('--i_print', type=whole(1), default=100, help='loss and PSNR')
    add('--i_img', type=whole(1), default=500, help='a held-out view in TensorBoard')
    add('--i_weights', type=whole(1), default=10000, help='a checkpoint')
    add('--save_minutes', type=number(above=0), default=10., help='a checkpoint after so many minutes too')
    add('--i_testset', type=whole(1), default=50000, help='all test views')
    add('--i_video', type=whole(1), default=50000, help='a video of the path')
