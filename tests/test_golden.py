"""Values recorded from nerf-pytorch: ours are equal."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, GOLDEN, golden, needs_data, needs_golden
from tiny_devices import DEVICE, on_cpu_only

from accel.network_query import NetworkQuery
from load_blender import load_blender_data
from load_llff import load_llff_data
from run_nerf import create_nerf, frame_renderer, raw2outputs, render, render_frame, run_network
from run_nerf_helpers import (
    EncodedNeRF,
    NeRF,
    get_embedder,
    get_rays,
    get_rays_np,
    img2mse,
    ndc_rays,
    sample_pdf,
    to8b,
)
from scenes.cameras import Camera
from training.metrics import psnr
from training.options import config_parser
from training.outputs import Frame
from training.processes import Processes

pytestmark = needs_golden


def close(found, expected, atol, rtol=0.0):
    found = found.detach().cpu().numpy() if torch.is_tensor(found) else found
    np.testing.assert_allclose(found, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize('multires, index', [(10, 0), (4, 1)])
def test_encoding(multires, index):
    recorded = golden('embedder.npz')
    embed, dim = get_embedder(multires)
    assert dim == recorded['dims'][index]
    close(embed(torch.from_numpy(recorded['x'])), recorded[f'multires{multires}'], 1e-6)


def test_no_encoding():
    embed, dim = get_embedder(10, -1)
    x = torch.randn(5, 3)
    assert dim == golden('embedder.npz')['identity_dim'] and torch.equal(embed(x), x)


def test_rays():
    recorded = golden('rays.npz')
    H, W, K = int(recorded['H']), int(recorded['W']), recorded['K']
    for found in (get_rays(H, W, K, torch.from_numpy(recorded['c2w'])),
                  get_rays_np(H, W, K, recorded['c2w'])):
        close(found[0], recorded['rays_o'], 1e-6)
        close(found[1], recorded['rays_d'], 1e-6)


def test_ndc_rays():
    recorded = golden('rays.npz')
    rays_o, rays_d = torch.from_numpy(recorded['ndc_in_o']), torch.from_numpy(recorded['ndc_in_d'])
    H, W, focal, near = int(recorded['H']), int(recorded['W']), recorded['K'][0][0], float(recorded['near'])
    found = ndc_rays(H, W, focal, near, rays_o, rays_d)
    close(found[0], recorded['ndc_o'], 1e-6)
    close(found[1], recorded['ndc_d'], 1e-6)


@pytest.mark.parametrize('key, options', [('det', {'det': True}), ('pytest_random', {'pytest': True})])
def test_sample_pdf(key, options):
    recorded = golden('sample_pdf.npz')
    bins, weights = torch.from_numpy(recorded['bins']), torch.from_numpy(recorded['weights'])
    close(sample_pdf(bins, weights, int(recorded['N_samples']), **options), recorded[key], 1e-5)


@pytest.mark.parametrize('prefix, options', [('', {}), ('white_', {'white_bkgd': True}),
                                             ('noise1_pytest_', {'raw_noise_std': 1.0, 'pytest': True})])
def test_raw2outputs(prefix, options):
    recorded = golden('raw2outputs.npz')
    raw, z_vals, rays_d = (torch.from_numpy(recorded[key]).to(DEVICE) for key in ('raw', 'z_vals', 'rays_d'))
    names = ('rgb_map', 'disp_map', 'acc_map', 'weights', 'depth_map')
    for name, found in zip(names, raw2outputs(raw, z_vals, rays_d, **options)):
        expected = recorded[prefix + name]
        if name == 'disp_map':
            expected = np.nan_to_num(expected, nan=0.0)  # nerf-pytorch divides 0 by 0 on an empty ray
        close(found, expected, 1e-5)


# --- render and train ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def recorded_training():
    return golden('render_and_train.npz')


def from_nerf_pytorch(**sizes):
    """As in nerf-pytorch: two networks on encoded inputs, and the function that encodes and applies them."""
    embed_fn, input_ch = get_embedder(10)
    embeddirs_fn, input_ch_views = get_embedder(4)

    def query(inputs, viewdirs, network):
        return run_network(inputs, viewdirs, network, embed_fn, embeddirs_fn)
    return [NeRF(input_ch=input_ch, input_ch_views=input_ch_views, **sizes) for _ in range(2)], query


def with_encodings(**sizes):
    """Two networks that hold their encodings, and a `NetworkQuery`."""
    encoding, input_ch = get_embedder(10)
    encoding_views, input_ch_views = get_embedder(4)
    networks = [EncodedNeRF(encoding, encoding_views, input_ch=input_ch, input_ch_views=input_ch_views,
                            **sizes) for _ in range(2)]
    return networks, NetworkQuery()


@pytest.fixture(params=[from_nerf_pytorch, with_encodings])
def recorded_networks(request, recorded_training):
    """The two networks of the recording and the kwargs of its `render`."""
    networks, query = request.param(D=8, W=64, output_ch=5, skips=[4], use_viewdirs=True)
    for name, network in zip(('coarse', 'fine'), networks):
        prefix = f'init.{name}.'
        network.load_state_dict({key[len(prefix):]: torch.from_numpy(value)
                                 for key, value in recorded_training.items() if key.startswith(prefix)})
    kwargs = {'network_fn': networks[0], 'network_fine': networks[1], 'network_query_fn': query,
              'N_samples': 32, 'N_importance': 64, 'perturb': 0.0, 'white_bkgd': True, 'use_viewdirs': True,
              'ndc': False, 'near': 2.0, 'far': 6.0, 'retraw': True}
    return networks, kwargs


def render_recorded(recorded, rays, kwargs):
    H, W = int(recorded['H']), int(recorded['W'])
    return render(H, W, recorded['K'], chunk=1024, rays=torch.from_numpy(rays).to(DEVICE), **kwargs)


def test_render(recorded_training, recorded_networks):
    _, kwargs = recorded_networks
    rgb, disp, acc, extras = render_recorded(recorded_training, recorded_training['rays'], kwargs)
    found = {'rgb_map': rgb, 'disp_map': disp, 'acc_map': acc, **extras}
    expected = {key[4:]: value for key, value in recorded_training.items() if key.startswith('out.')}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key.startswith('disp'):
            value = np.nan_to_num(value, nan=0.0)  # empty rays, 0 / 0 in nerf-pytorch
        close(found[key], value, 1e-5)


def test_training_trajectory(recorded_training, recorded_networks):
    (coarse, fine), kwargs = recorded_networks
    optimizer = torch.optim.Adam([*coarse.parameters(), *fine.parameters()], lr=5e-4, betas=(0.9, 0.999))
    losses = []
    batches = zip(recorded_training['batch_rays'], recorded_training['batch_targets'])
    for step, (rays, target) in enumerate(batches):
        rgb, _, _, extras = render_recorded(recorded_training, rays, kwargs)
        target = torch.from_numpy(target).to(DEVICE)
        loss = img2mse(rgb, target) + img2mse(extras['rgb0'], target)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for key, expected in recorded_training.items():
                if key.startswith('grad.'):
                    gradient = fine.get_parameter(key[5:]).grad
                    close(gradient, expected, 1e-4 * np.abs(expected).max(), 1e-4)
        optimizer.step()
        for group in optimizer.param_groups:
            group['lr'] = 5e-4 * 0.1 ** (step / 500000)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, recorded_training['losses'], rtol=1e-4)


# --- loaders ------------------------------------------------------------------------------------------------

@needs_data
@pytest.mark.parametrize('name, half_res, step', [('blender_lego.npz', False, 40),
                                                  ('blender_lego_half.npz', True, 40)])
def test_blender_loader(name, half_res, step):
    recorded = golden(name)
    imgs, poses, render_poses, hwf, i_split = load_blender_data(DATA / 'nerf_synthetic/lego', half_res,
                                                                testskip=8)
    count = len(imgs)  # the recorded scene had 12 more test views, after those that we have
    assert [len(part) for part in i_split] == [*recorded['counts'][:2], 13]
    assert count == sum(map(len, i_split))
    assert imgs.shape[1:] == tuple(recorded['image_shape'][1:])
    close(poses, recorded['poses'][:count], 1e-6)
    close(render_poses, recorded['render_poses'], 1e-6)
    np.testing.assert_allclose(hwf, recorded['hwf'], rtol=1e-6)
    means = recorded['image_means'][:count]  # summed in the recorded dtype, float32 for one of the two
    close(imgs.mean((1, 2), dtype=means.dtype), means, 1e-6)
    found = imgs[::4, ::step, ::step]
    close(found, recorded['pixels'][:len(found)], 1e-6)


@needs_data
@pytest.mark.parametrize('name, spherify', [('llff_fern.npz', False), ('llff_fern_spherify.npz', True)])
def test_llff_loader(name, spherify):
    recorded = golden(name)
    images, poses, bds, render_poses, i_test = load_llff_data(DATA / 'nerf_llff_data/fern', 8, recenter=True,
                                                              bd_factor=.75, spherify=spherify)
    assert images.shape == tuple(recorded['image_shape']) and i_test == recorded['i_test']
    close(poses[:, :, :4], recorded['poses'][:, :, :4], 1e-5)
    np.testing.assert_allclose(poses[:, :, 4], recorded['poses'][:, :, 4], rtol=1e-6)
    close(bds, recorded['bds'], 1e-5)
    close(render_poses[:, :, :4], recorded['render_poses'][:, :, :4], 1e-5)
    close(images.mean((1, 2)), recorded['image_means'], 1e-6)  # float32 sums, as recorded
    close(images[:, ::50, ::50], recorded['pixels'], 1e-6)


# --- a checkpoint of nerf-pytorch ---------------------------------------------------------------------------

@pytest.fixture(scope='module')
def nerf_pytorch_checkpoint(tmp_path_factory):
    """Options, and the results of `create_nerf`, of a run that starts from the recorded checkpoint."""
    args = config_parser().parse_args([
        '--config', str(GOLDEN / 'checkpoint/config.txt'), '--ft_path', str(GOLDEN / 'checkpoint/002000.tar'),
        '--basedir', str(tmp_path_factory.mktemp('logs')), '--device', str(DEVICE)])
    created = create_nerf(args)
    for kwargs in created[:2]:
        kwargs.update(near=2.0, far=6.0)
    return args, created


def test_a_nerf_pytorch_checkpoint_resumes_at_its_step(nerf_pytorch_checkpoint):
    _, (_, _, start, _, optimizer) = nerf_pytorch_checkpoint
    assert start == 2000
    assert {state['step'].item() for state in optimizer.state.values()} == {2000}


def recorded_view():
    """Recorded values of a frame at every second pixel, its intrinsics, and the size of the frame."""
    recorded = golden('checkpoint/render.npz')
    H, W, focal = recorded['hwf']
    return recorded, np.array([[focal, 0, 0.5 * W], [0, focal, 0.5 * H], [0, 0, 1]]), (int(H), int(W))


def assert_equals_recorded(frame, recorded, stride):
    """Colour, opacity and disparity of a frame [H, W, ...]; `stride` is that of the recorded pixels to
    compare."""
    for found, key in ((frame.rgb, 'rgb'), (frame.acc, 'acc'), (frame.disp, 'disp')):
        close(found, np.nan_to_num(recorded[key], nan=0.0)[::stride, ::stride], 2e-3)


@pytest.mark.parametrize('every', [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_nerf_pytorch_checkpoint_renders_the_same_exactly(nerf_pytorch_checkpoint, every):
    """Some or all of the recorded pixels, by the exact renderer."""
    _, (_, kwargs, *_) = nerf_pytorch_checkpoint
    recorded, K, _ = recorded_view()
    frame = render_frame(recorded['c2w'], recorded['hwf'], K, 4096, kwargs, stride=2 * every)
    assert_equals_recorded(frame, recorded, every)


@needs_data
@on_cpu_only('a GPU renders with bfloat16 products, which differ more')
def test_a_nerf_pytorch_checkpoint_renders_the_same(nerf_pytorch_checkpoint):
    """The whole frame, as the script renders it."""
    args, (kwargs_train, kwargs_test, *_) = nerf_pytorch_checkpoint
    recorded, K, (H, W) = recorded_view()
    imgs, poses, _, _, i_split = load_blender_data(DATA / 'nerf_synthetic/lego', half_res=True, testskip=8)
    scene = SimpleNamespace(H=H, W=W, K=K, poses=poses[:, :3, :4].astype(np.float32), near=2.0, far=6.0,
                            hwf=recorded['hwf'], cameras=[Camera(H, W, K)] * len(poses))
    frames = frame_renderer(args, scene, kwargs_train, kwargs_test, Processes(1), None, print)
    frame = frames.render(recorded['c2w'])
    assert_equals_recorded(Frame(frame.rgb[::2, ::2], frame.disp[::2, ::2], frame.acc[::2, ::2]), recorded, 1)

    target = imgs[i_split[2][0]]
    target = target[..., :3] * target[..., 3:] + (1 - target[..., 3:])
    mse = np.mean((frame.rgb - target) ** 2)
    assert -10 * np.log10(mse) == pytest.approx(float(recorded['psnr']), abs=0.01)
    assert psnr(to8b(frame.rgb), to8b(target)) == pytest.approx(float(recorded['psnr']), abs=0.05)
