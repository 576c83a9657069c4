"""The options of `run_nerf.py`: those of nerf-pytorch with their defaults, and a few more.

The command line overrides the config file, switches included: `--no-half_res` turns off `half_res = True`.
Each option declares what it affects:

  networks   what a network's outputs mean: its architecture, and how rays are sampled and composited with it
  scene      the images and cameras
  training   the course of training
  source     where the data is, which test views are loaded, what the run is called; and pixel_centers,
             which a checkpoint overrides
  rendering  what frames look like, in addition to networks and scene; and the precision, also of training
  nothing    how a run is driven: its start and length, speed, memory and outputs

Resuming warns if networks, scene or training differ from the checkpoint. `--render_only` takes these and
source from the checkpoint where they are not given. Frames are reused if networks, scene and rendering are
the same.
"""
import argparse
import io
import re
from pathlib import Path

import configargparse

from scenes.paths import FPS, FPS_RANGE, MAX_SIDE

BooleanSwitch = argparse.BooleanOptionalAction
# An option affects one of these.
KINDS = ('networks', 'scene', 'training', 'source', 'rendering', 'nothing')


def open_config(path, mode='r'):
    """Open a config file.

    Raises:
      OSError: sections, repeated keys or `config`, which the parser would silently ignore.
    """
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


class OptionParser(configargparse.ArgumentParser):
    """Knows what each option affects, reports errors in one line without the usage, and names the config
    file that holds an unknown key.

    Attributes:
      affects: dict name -> one of KINDS.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.affects = {}

    def add_options(self, title):
        """Add a group to the help. Returns the function `add(name, affects=KIND, ...)` that adds an option to
        it."""
        group = self.add_argument_group(title)

        def add(name, *, affects, **settings):
            assert affects in KINDS, affects
            action = group.add_argument(name, **settings)
            self.affects[action.dest] = affects
        return add

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')

    def parse_args(self, *args, **kwargs):
        """The options. `args.given` holds the names of those that the command line or a config file gives."""
        known, unknown = self.parse_known_args(*args, **kwargs)
        given = set()
        for source, settings in self.get_source_to_settings_dict().items():
            for key, (action, words) in settings.items():
                if source == 'command_line':
                    strings = {word.split('=')[0] for word in words if isinstance(word, str)}
                    given |= {action.dest for action in self._actions if strings & {*action.option_strings}}
                elif source.startswith('config_file') and action is not None:
                    given.add(action.dest)
                elif source.startswith('config_file'):
                    self.error(f'{source.partition("|")[2]}: unknown key {key!r}; --help lists the options')
        if unknown:
            self.error(f'unknown option {" ".join(unknown)}; --help lists the options')
        self.check(known)
        known.given = frozenset(given)
        if 'factor' not in given and known.dataset_type != 'llff':
            known.factor = 1  # nerf-pytorch's default is for llff alone
        return known

    def check(self, args):
        """Check options against each other."""
        if not args.expname and not (args.render_only and args.ft_path):  # the checkpoint has the name
            self.error('no experiment: give --config FILE, such as configs/demo.txt, or --expname NAME')
        if args.N_importance > 0 and args.N_samples < 3:
            self.error(f'argument --N_samples: found {args.N_samples}, '
                       'expected at least 3 with --N_importance')
        if args.occupancy_grid and args.N_importance > 0:
            self.error(f'argument --N_importance: found {args.N_importance}, expected 0 with '
                       '--occupancy_grid, which takes the place of the coarse network')
        if args.sampler == 'proposal' and (args.occupancy_grid or args.N_importance > 0):
            self.error('argument --sampler: proposal is not available with --occupancy_grid and '
                       '--N_importance')
        if args.lambda_distortion > 0 and args.sampler != 'proposal':
            self.error('argument --lambda_distortion: needs --sampler proposal')
        if args.contract and not (args.sampler == 'proposal' and args.i_embed == 1):
            self.error('argument --contract: needs --sampler proposal and --i_embed 1')
        if args.contract and (args.lindisp or (args.dataset_type == 'llff' and not args.no_ndc)):
            self.error('argument --contract: not available with --lindisp or in normalised device '
                       'coordinates; llff scenes need --no_ndc')
        if args.appearance and (args.N_importance > 0 or args.no_batching or args.random_bkgd):
            self.error('argument --appearance: not available with --N_importance, --no_batching or '
                       '--random_bkgd')
        if args.lambda_depth > 0 and (args.no_batching or args.precrop_iters > 0):
            self.error('argument --lambda_depth: not available with --no_batching or --precrop_iters')
        if args.occupancy_grid and args.lindisp:
            self.error('argument --lindisp: not available with --occupancy_grid, whose steps are equal')
        bounded = args.occupancy_grid or args.sampler == 'proposal'
        if args.random_bkgd and args.i_embed == 1 and not bounded:
            self.error('argument --random_bkgd: needs --occupancy_grid or --sampler proposal if --i_embed is '
                       '1: the density of hash networks is never 0, so the unbounded last interval would '
                       'always be opaque')
        if args.i_embed == 2:
            self.error('argument --i_embed: found 2, expected 0, 1 or -1; spherical harmonics encode '
                       'directions, see --i_embed_views')
        if args.aabb is not None and not all(low < high for low, high in zip(args.aabb[:3], args.aabb[3:])):
            found = ' '.join(f'{x:g}' for x in args.aabb)
            self.error(f'argument --aabb: found {found}, expected X0 < X1, Y0 < Y1, Z0 < Z1')
        if args.dataparser_transforms and not args.render_poses:
            self.error('argument --dataparser_transforms: needs --render_poses')
        if args.render_size and args.render_test:
            self.error('argument --render_size: not available with --render_test, whose frames have the size '
                       'of the test images')
        if args.near is not None and args.far is not None and args.near >= args.far:
            self.error(f'arguments --near, --far: found {args.near} and {args.far}, expected near < far')


def plain_options(args):
    """The options alone, without `given`, as sorted (name, value) pairs."""
    return [(name, value) for name, value in sorted(vars(args).items()) if name != 'given']


def options_that_affect(*kinds):
    """The names of all options that affect one of `kinds`, sorted."""
    assert set(kinds) <= set(KINDS), kinds
    return sorted(name for name, kind in config_parser().affects.items() if kind in kinds)


def values_of(args, *kinds):
    """The values of all options that affect one of `kinds`, a dict by name."""
    return {name: vars(args)[name] for name in options_that_affect(*kinds)}


def integer(least, most=2 ** 63 - 1):
    """An option type: an integer from `least` to `most`."""
    expected = f'of at least {least}' if most == 2 ** 63 - 1 else f'from {least} to {most}'

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f'found {text!r}, expected a whole number {expected}')
        return value
    return parse


def number(least=float('-inf'), above=float('-inf'), most=float('inf')):
    """An option type: a finite number with `least` <= number <= `most` and number > `above`."""
    limits = {'of at least': least, 'greater than': above, 'of at most': most}
    stated = [f'{word} {limit:g}' for word, limit in limits.items() if abs(limit) != float('inf')]
    expected = ' and '.join(stated)

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float('nan')
        if not (least <= value <= most and value > above and abs(value) != float('inf')):
            raise argparse.ArgumentTypeError(f'found {text!r}, expected a finite number {expected}'.rstrip())
        return value
    return parse


def config_parser():
    """The parser of all options. Its `parse_args` exits with code 2 and a one-line message on invalid
    options."""
    parser = OptionParser(prog='run_nerf.py', description='Train a NeRF and render novel views.',
                           allow_abbrev=False, config_file_open_func=open_config,
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for add_group in (_run_options, _data_options, _network_options, _training_options, _real_scene_options,
                      _rendering_options, _render_only_options, _logging_options):
        add_group(parser)
    return parser


def _run_options(parser):
    add = parser.add_options('run')
    add('--config', affects='nothing', is_config_file=True, metavar='FILE',
        help='config file with lines of key = value, where the keys are the options below')
    add('--expname', affects='source', help='name of the experiment')
    add('--basedir', affects='nothing', default='./logs/', help='outputs go to <basedir>/<expname>')
    add('--datadir', affects='source', default='./data/llff/fern', help='folder of the scene')
    add('--check_data', affects='nothing', action=BooleanSwitch, default=False,
        help='do not train: check the scene, and write report.html to <basedir>/<expname>')
    add('--viewer', affects='nothing', action=BooleanSwitch, default=False,
        help='show the run in the browser while it trains')
    add('--viewer_port', affects='nothing', type=integer(1), default=8080,
        help='or the next one that is free')
    add('--seed', affects='training', type=integer(0), default=0, help='random seed')
    add('--device', affects='nothing', default='auto',
        help='auto (CUDA if there is a GPU), cpu, cuda, cuda:1, …')


def _data_options(parser):
    add = parser.add_options('data')
    add('--dataset_type', affects='scene', default='llff',
        help='layout of the scene on disk: blender, llff or colmap')
    add('--testskip', affects='source', type=integer(0), default=8,
        help='blender: load every n-th image of val and test; 0 for all')
    add('--white_bkgd', affects='networks', action=BooleanSwitch, default=False,
        help='composite onto white instead of black')
    add('--half_res', affects='scene', action=BooleanSwitch, default=False,
        help='blender and colmap: load the images at half resolution')
    add('--factor', affects='scene', type=integer(0), default=8,
        help='downsample the images by this factor; 0 or 1 for full size (default of blender and colmap: 1)')
    add('--no_ndc', affects='scene', action=BooleanSwitch, default=False,
        help='llff: do not use normalised device coordinates (for scenes that are not forward-facing)')
    add('--lindisp', affects='networks', action=BooleanSwitch, default=False,
        help='sample evenly in disparity rather than depth (not in NDC)')
    add('--spherify', affects='scene', action=BooleanSwitch, default=False,
        help='llff: the cameras look inwards from all around')
    add('--train_views', affects='training', type=integer(1), default=None,
        help='train on only this many of the training views, evenly spaced')
    add('--llffhold', affects='scene', type=integer(0), default=8,
        help='llff, colmap and transforms.json: hold out every n-th image as a test view')
    add('--near', affects='networks', type=number(least=0),
        help='near bound in units of rays_d; taken from the data by default')
    add('--far', affects='networks', type=number(above=0),
        help='far bound in units of rays_d; taken from the data by default')
    add('--aabb', affects='networks', type=number(), nargs=6, metavar=('X0', 'Y0', 'Z0', 'X1', 'Y1', 'Z1'),
        help='bounding box of hash grids and occupancy grid, in NDC for forward-facing scenes; '
             'estimated from the data by default')
    add('--random_bkgd', affects='training', action=BooleanSwitch, default=False,
        help='blender: average the loss over all background colours; needs images with alpha')
    add('--pixel_centers', affects='source', action=BooleanSwitch, default=False,
        help='cast rays through pixel centres rather than corners; a trained checkpoint keeps its own choice')


def _network_options(parser):
    add = parser.add_options('networks')
    add('--netdepth', affects='networks', type=integer(1), default=8, help='layers in the coarse network')
    add('--netwidth', affects='networks', type=integer(2), default=256,
        help='channels per layer of the coarse network')
    add('--netdepth_fine', affects='networks', type=integer(1), default=8, help='layers in the fine network')
    add('--netwidth_fine', affects='networks', type=integer(2), default=256,
        help='channels per layer of the fine network')
    add('--use_viewdirs', affects='networks', action=BooleanSwitch, default=False,
        help='let colour depend on the view direction')
    add('--i_embed', affects='networks', type=int, default=0,
        help='encoding of positions: 0 positional, 1 multiresolution hash grid with a small network, -1 none')
    add('--i_embed_views', affects='networks', type=int, default=None,
        help='encoding of directions: 0 positional, 2 spherical harmonics, -1 none; '
             'by default 2 with hash grids, otherwise the same as --i_embed')
    add('--n_levels', affects='networks', type=integer(1, 64), default=16,
        help='hash grids: number of resolutions')
    add('--n_features', affects='networks', type=int, choices=[1, 2, 4, 8], default=2,
        help='hash grids: features per entry')
    add('--log2_hashmap_size', affects='networks', type=integer(4, 28), default=19,
        help='hash grids: log2 of the most entries per level')
    add('--finest_res', affects='networks', type=integer(16, 2 ** 20), default=2048,
        help='hash grids: cells along each side of the finest level')
    add('--multires', affects='networks', type=integer(1), default=10,
        help='number of frequencies that encode positions')
    add('--multires_views', affects='networks', type=integer(1), default=4,
        help='number of frequencies that encode directions')


def _training_options(parser):
    add = parser.add_options('training')
    add('--N_iters', affects='nothing', type=integer(1), default=200000, help='training steps')
    add('--minutes', affects='nothing', type=number(above=0), default=None,
        help='train for this long instead, test views and video included; a run that is resumed with more '
             'minutes goes on')
    add('--N_rand', affects='training', type=integer(1), default=32 * 32 * 4, help='rays per step')
    add('--lrate', affects='training', type=number(above=0), default=5e-4, help='initial learning rate')
    add('--lrate_decay', affects='training', type=number(above=0), default=250,
        help='thousands of steps in which the learning rate decays to a tenth')
    add('--occupancy_grid', affects='networks', action=BooleanSwitch, default=False,
        help='one network, sampled only in occupied cells; N_samples steps span the diagonal of the box')
    add('--sampler', affects='networks', choices=['hierarchical', 'proposal'], default='hierarchical',
        help='hierarchical: coarse samples, then fine ones where their weights are; proposal: two '
             'density grids decide where the N_samples samples of one network lie')
    add('--N_rand_samples', affects='training', type=integer(1), default=2 ** 18,
        help='with --occupancy_grid: samples per step; the number of rays adapts to it, up to N_rand')
    add('--no_batching', affects='training', action=BooleanSwitch, default=False,
        help='draw the rays of a step from one image rather than from all')
    add('--precrop_iters', affects='training', type=integer(0), default=0,
        help='train on central crops of the images before step n')
    add('--precrop_frac', affects='training', type=number(above=0, most=1), default=.5,
        help='fraction of the image side that these crops keep')
    add('--precision', affects='rendering', choices=['auto', 'fp32', 'tf32', 'bf16'], default='auto',
        help='precision of matrix products in the hidden layers; auto: bf16 in training if that is fast on '
             'the device, fp32 in exact rendering')
    add('--backward', affects='training', choices=['auto', 'sparse', 'sampled', 'plain'], default='auto',
        help='sparse: store no activations and backpropagate only through samples that have a gradient; '
             'sampled: draw some of the samples with a small gradient to stand for the others, which has the '
             'same expectation; plain: ordinary backpropagation; auto: sparse, but plain for hash networks '
             'on a GPU')
    add('--no_reload', affects='nothing', action=BooleanSwitch, default=False,
        help='start from scratch even if there are checkpoints')
    add('--no_restart', affects='training', action=BooleanSwitch, default=False,
        help='do not reinitialise a network that collapses to the background')
    add('--ft_path', affects='nothing',
        help='checkpoint to start from instead of the newest of the experiment')


def _real_scene_options(parser):
    add = parser.add_options('real scenes')
    add('--contract', affects='networks', action=BooleanSwitch, default=False,
        help='with --sampler proposal and --i_embed 1, for scenes without bounds: the hash grids cover all '
             'space, contracted outside --aabb or the cube around the cameras; --far only scales depth maps')
    add('--appearance', affects='networks', action=BooleanSwitch, default=False,
        help='photos differ in exposure: train an affine change of colour for each; held-out views are '
             'measured on their right half, after fitting one to the left half')
    add('--refine_poses', affects='networks', action=BooleanSwitch, default=False,
        help='camera poses are estimates: train a small rotation and shift of each; held-out views are '
             'measured after aligning their poses to them')
    add('--lrate_poses', affects='training', type=number(above=0), default=3e-4,
        help='with --refine_poses: initial learning rate of the poses, in radians and halves of the box')
    add('--lambda_depth', affects='training', type=number(least=0), default=0.,
        help="weight of the depth loss: rays through the sparse points of the COLMAP model in the scene's "
             'folder, sparse/0, should end there')
    add('--lambda_distortion', affects='training', type=number(least=0), default=0.,
        help='with --sampler proposal: weight of the distortion loss, which pulls the weights of a ray '
             'together')


def _rendering_options(parser):
    add = parser.add_options('rendering')
    add('--N_samples', affects='networks', type=integer(1), default=64, help='coarse samples per ray')
    add('--N_importance', affects='networks', type=integer(0), default=0,
        help='additional fine samples per ray')
    add('--perturb', affects='training', type=number(least=0), default=1.,
        help='1 to jitter the samples in training, 0 for no jitter')
    add('--raw_noise_std', affects='training', type=number(least=0), default=0.,
        help='standard deviation of the noise added to the density in training')
    add('--exact_render', affects='rendering', action=BooleanSwitch, default=False,
        help='evaluate the networks at every sample, visible or not; with --occupancy_grid or --sampler '
             'proposal: render without the kernels for whole rays')
    add('--chunk', affects='nothing', type=integer(1),
        help='most rays rendered at once (default: as many as suit the device)')
    add('--netchunk', affects='nothing', type=integer(1),
        help='most points evaluated at once (default: as many as suit the device and its memory)')


def _render_only_options(parser):
    add = parser.add_options('render only')
    add('--render_only', affects='nothing', action=BooleanSwitch, default=False,
        help='do not train: load the checkpoint and render the camera path')
    add('--render_test', affects='nothing', action=BooleanSwitch, default=False,
        help='with --render_only: render the test views instead of the path')
    add('--render_factor', affects='rendering', type=integer(0), default=0,
        help='with --render_only: divide width and height by this; 4 or 8 for a quick preview')
    add('--render_poses', affects='nothing', metavar='FILE',
        help='your own camera path: a file of tools/path.py or nerfstudio, a transforms file, or .npy or '
             '.json with c2w matrices [N, 3 or 4, 4] in the coordinates of the loaded scene')
    add('--dataparser_transforms', affects='nothing', metavar='FILE',
        help="with a path of nerfstudio: its run's dataparser_transforms.json, if it is not beside the path")
    add('--render_size', affects='rendering', type=integer(1, MAX_SIDE), nargs=2, metavar=('W', 'H'),
        help='size of the frames along the camera path, with the same vertical field of view (default: that '
             'of the path, or of the images)')
    add('--fps', affects='nothing', type=number(least=FPS_RANGE[0], most=FPS_RANGE[1]),
        help=f'frames per second of videos (default: as the camera path says, or {FPS})')
    add('--overwrite', affects='nothing', action=BooleanSwitch, default=False,
        help='render all frames again, also those that could be reused')


def _logging_options(parser):
    add = parser.add_options('logging')
    add('--i_print', affects='nothing', type=integer(1), default=100,
        help='print loss and PSNR every n steps')
    add('--i_img', affects='nothing', type=integer(1), default=500,
        help='show a held-out view in TensorBoard every n steps')
    add('--i_weights', affects='nothing', type=integer(1), default=10000,
        help='save a checkpoint every n steps')
    add('--save_minutes', affects='nothing', type=number(above=0), default=10.,
        help='also save a checkpoint after this many minutes')
    add('--i_testset', affects='nothing', type=integer(1), default=50000,
        help='render all test views every n steps')
    add('--i_video', affects='nothing', type=integer(1), default=50000,
        help='render a video of the camera path every n steps')
