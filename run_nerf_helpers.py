"""The parts of NeRF: losses, positional encoding, the MLP, rays, NDC and inverse-transform sampling.

Vocabulary, as in the paper and in `run_nerf.py`:
  rays_o, rays_d  origin and direction of a ray r(t) = rays_o + t * rays_d; rays_d is not normalised
  viewdirs        unit vectors along rays_d, what the colour may depend on
  z_vals          the t of the samples along a ray
  pts             the sample positions r(t)
  weights         how much each sample contributes to its pixel, T_i * (1 - exp(-sigma_i * delta_i)), Eq. 3
  c2w             camera to world [3, 4], in OpenGL axes: x right, y up, -z forward
  K               intrinsics [3, 3] in pixels
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# This is added to every weight before sampling, so that a ray without any weight is sampled evenly.
PDF_EPS = 1e-5
# An interval of less probability than this is sampled at its lower end, instead of dividing by almost 0.
MIN_PROBABILITY = 1e-5
# Rays of less opacity than this count as empty; their disparity is 0.
MIN_OPACITY = 1e-10
# Depths are clamped to this before they are inverted.
MIN_DEPTH = 1e-10


# --- losses and 8-bit images --------------------------------------------------------------------------------

def img2mse(x, y):
    """Mean squared error over all elements, a scalar tensor (Sec. 5.3, Eq. 6, as a mean)."""
    return F.mse_loss(x, y)


def img2mse_random_bkgd(rgb, acc, target, bkgd):
    """The expectation of `img2mse` over background colours b, uniform in [0, 1]^3, in closed form.

    It is the error on the mean background, grey, plus the variance of the background, 1/12, times the squared
    error of the opacity.

    Args:
      rgb: rendered colours on `bkgd` [N, 3].
      acc: rendered opacities [N].
      target: colours on `bkgd` and alpha [N, 4].
      bkgd: grey value of the background, 0 or 1.
    """
    opacity, alpha, to_grey = acc[:, None], target[:, 3:], bkgd - 0.5
    on_grey = torch.add(rgb, opacity, alpha=to_grey), torch.add(target[:, :3], alpha, alpha=to_grey)
    return torch.add(F.mse_loss(*on_grey), F.mse_loss(opacity, alpha), alpha=1 / 12)


def color_error(rgb, acc, target, bkgd):
    """Mean squared error of colours [N, 3] with opacity [N] on `bkgd`; for a `target` [N, 4] with alpha, the
    expected error over random backgrounds."""
    return img2mse(rgb, target) if target.shape[-1] == 3 else img2mse_random_bkgd(rgb, acc, target, bkgd)


def mse2psnr(x):
    """Peak signal-to-noise ratio in dB of a mean squared error, for a signal in [0, 1]."""
    return -10 * torch.log10(x)


def to8b(x):
    """Array in [0, 1] to uint8; values outside are clipped, fractions are cut off as in nerf-pytorch."""
    return (255 * np.clip(x, 0, 1)).astype(np.uint8)


# --- positional encoding (Sec. 5.1) -------------------------------------------------------------------------

class Embedder(nn.Module):
    """gamma(x) of Eq. 4: x itself, then sin and cos of each frequency times x, frequency after frequency.

    As in the paper's released code the frequencies are 2^k, without the factor pi of Eq. 4.

    Args:
      include_input: whether x itself comes first.
      input_dims: size of the last axis of x, for `out_dim`; `embed` takes any.
      max_freq_log2: log2 of the highest frequency.
      num_freqs: number of frequencies.
      log_sampling: powers of two if true, otherwise evenly spaced up to 2^max_freq_log2.
      periodic_fns: functions applied to every frequency.
    """

    def __init__(self, include_input=True, input_dims=3, max_freq_log2=9, num_freqs=10, log_sampling=True,
                 periodic_fns=(torch.sin, torch.cos)):
        super().__init__()
        self.include_input, self.periodic_fns = include_input, periodic_fns
        self.max_freq_log2, self.num_freqs, self.log_sampling = max_freq_log2, num_freqs, log_sampling
        self.out_dim = input_dims * (include_input + num_freqs * len(periodic_fns))
        self.bands = {}  # the frequencies by device and dtype

    def frequencies(self, like):
        """The frequency bands [num_freqs] on the device and in the dtype of the tensor `like`."""
        key = like.device, like.dtype
        if key not in self.bands:
            factory_kwargs = {'device': like.device, 'dtype': like.dtype}
            if self.log_sampling:
                bands = 2.0 ** torch.linspace(0.0, self.max_freq_log2, self.num_freqs, **factory_kwargs)
            else:
                bands = torch.linspace(1.0, 2.0 ** self.max_freq_log2, self.num_freqs, **factory_kwargs)
            self.bands[key] = bands
        return self.bands[key]

    def embed(self, inputs):
        """`inputs` [..., C] to their encoding [..., C * (include_input + num_freqs * len(periodic_fns))]."""
        C, L, P = inputs.shape[-1], self.num_freqs, len(self.periodic_fns)
        scaled = inputs[..., None, :] * self.frequencies(inputs)[:, None]              # [..., L, C]
        if inputs.device.type != 'cpu' or (inputs.requires_grad and torch.is_grad_enabled()):
            waves = torch.stack([fn(scaled) for fn in self.periodic_fns], -2)          # [..., L, P, C]
            waves = waves.flatten(-3)                                                  # [..., L * P * C]
            return torch.cat([inputs, waves], -1) if self.include_input else waves

        # without gradients, write into one tensor: on a CPU that is faster than to stack and concatenate
        first = C if self.include_input else 0
        encoded = inputs.new_empty(*inputs.shape[:-1], first + L * P * C)
        encoded[..., :first] = inputs[..., :first]
        waves = encoded[..., first:].unflatten(-1, (L, P, C))
        for i, fn in enumerate(self.periodic_fns):
            waves[..., i, :] = fn(scaled)
        return encoded

    forward = embed


class SphericalHarmonics(nn.Module):
    """Unit vectors [..., 3] to the 16 real spherical harmonics up to degree 3, [..., 16], in instant-ngp's
    order and with its signs."""
    out_dim = 16

    def forward(self, directions):
        x, y, z = directions.unbind(-1)
        xx, yy, zz = x * x, y * y, z * z
        return torch.stack([
            torch.full_like(x, 0.28209479177387814),
            -0.48860251190291987 * y, 0.48860251190291987 * z, -0.48860251190291987 * x,
            1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (3 * zz - 1),
            -1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy),
            -0.5900435899266435 * y * (3 * xx - yy), 2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (5 * zz - 1), 0.3731763325901154 * z * (5 * zz - 3),
            -0.4570457994644658 * x * (5 * zz - 1), 1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy)], -1)


def get_embedder(multires, i=0):
    """An encoding of 3-vectors, a module, and the size of its output.

    Args:
      multires: number of frequencies of the positional encoding.
      i: 0 for the positional encoding, -1 for none, 2 for spherical harmonics of unit vectors.
    Raises:
      ValueError: no such encoding.
    """
    if i == -1:
        return nn.Identity(), 3
    if i == 0:
        embedder = Embedder(max_freq_log2=multires - 1, num_freqs=multires)
    elif i == 2:
        embedder = SphericalHarmonics()
    else:
        raise ValueError(f'found encoding {i}, expected 0 (positional), -1 (none) or, for directions only, '
                         '2 (spherical harmonics)')
    return embedder, embedder.out_dim


# --- the network (Fig. 7 of the paper's supplement) ---------------------------------------------------------

def in_float32(layer, h):
    """Apply an encoding or a last layer in float32, even where autocast computes in bfloat16."""
    with torch.autocast(h.device.type, enabled=False):
        return layer(h.float())


class NeRF(nn.Module):
    """The MLP from an encoded position (and direction) to raw colour and density.

    Args:
      D, W: number and width of the layers that see the position.
      input_ch, input_ch_views: sizes of the encoded position and direction.
      output_ch: size of the output without view directions; with them it is always 4.
      skips: layers after which the encoded position is concatenated to the activations again.
      use_viewdirs: whether the colour depends on the direction.
    """

    def __init__(self, D=8, W=256, input_ch=3, input_ch_views=3, output_ch=4, skips=(4,), use_viewdirs=False):
        super().__init__()
        self.D, self.W = D, W
        self.input_ch, self.input_ch_views = input_ch, input_ch_views
        self.skips = [i for i in skips if i < D - 1]  # a skip needs a layer after it
        self.use_viewdirs = use_viewdirs

        # Names and order of the layers are those of existing checkpoints, optimizer states included.
        # `views_linears` exists without view directions too, unused, for the same reason.
        widths = [input_ch] + [W + input_ch if i in self.skips else W for i in range(D - 1)]
        self.pts_linears = nn.ModuleList([nn.Linear(width, W) for width in widths])
        self.views_linears = nn.ModuleList([nn.Linear(input_ch_views + W, W // 2)])
        if use_viewdirs:
            self.feature_linear = nn.Linear(W, W)
            self.alpha_linear = nn.Linear(W, 1)
            self.rgb_linear = nn.Linear(W // 2, 3)
        else:
            self.output_linear = nn.Linear(W, output_ch)

    def features(self, input_pts):
        """The activations after the layers that see the position: [..., input_ch] to [..., W]."""
        h = input_pts
        for i, layer in enumerate(self.pts_linears):
            h = F.relu(layer(h), inplace=True)
            if i in self.skips:
                h = torch.cat([input_pts.to(h.dtype), h], -1)
        return h

    def forward(self, x):
        """`x` [..., input_ch + input_ch_views] to raw [..., 4]: three colour logits and a density before its
        ReLU. Without view directions [..., output_ch]."""
        input_pts, input_views = torch.split(x, [self.input_ch, self.input_ch_views], dim=-1)
        h = self.features(input_pts)
        if not self.use_viewdirs:
            return in_float32(self.output_linear, h)

        sigma = in_float32(self.alpha_linear, h)
        h = self.feature_linear(h)
        h = torch.cat([h, input_views.to(h.dtype)], -1)
        for layer in self.views_linears:
            h = F.relu(layer(h), inplace=True)
        return torch.cat([in_float32(self.rgb_linear, h), sigma], -1)

    def load_weights_from_keras(self, weights):
        """Copy the weights of the paper's TensorFlow model: a list of kernel, bias, kernel, bias, … as Keras'
        `get_weights` returns it (position layers, bottleneck, view layer, colour, density; or position
        layers, output).

        Raises:
          ValueError: the list does not fit this network, which is left as it is.
        """
        if self.use_viewdirs:
            tail = [self.feature_linear, self.views_linears[0], self.rgb_linear, self.alpha_linear]
        else:
            tail = [self.output_linear]
        layers = [*self.pts_linears, *tail]
        if len(weights) != 2 * len(layers):
            raise ValueError(f'found {len(weights)} arrays of weights, expected {2 * len(layers)}')
        weights = [torch.as_tensor(np.asarray(array)) for array in weights]
        for layer, kernel, bias in zip(layers, weights[0::2], weights[1::2]):
            found, expected = [*kernel.shape, bias.numel()], [*layer.weight.T.shape, layer.bias.numel()]
            if found != expected:
                raise ValueError(f'found a Keras layer of shape {found} (in, out, bias), expected {expected}')
        with torch.no_grad():
            for layer, kernel, bias in zip(layers, weights[0::2], weights[1::2]):
                layer.weight.copy_(kernel.T)
                layer.bias.copy_(bias.reshape(-1))


def by_device(table, device):
    """The entry 'cpu' or 'cuda' of a dict; all devices but CPUs count as GPUs."""
    return table['cpu' if device.type == 'cpu' else 'cuda']


class RadianceField(nn.Module):
    """The interface of a network that encodes its inputs itself: positions and directions to raw colour and
    density.

    Encodings are submodules, so that learned ones are trained, saved and moved with the network. A submodule
    that owns parameters has a method `reset_parameters`, as torch's layers do.
    """
    W = 256  # Width of the hidden layers; narrow ones do not gain from bfloat16.
    # A chunk has at most this many activations in a layer, by type of device.
    CHUNK_ACTIVATIONS = {'cpu': 2 ** 24, 'cuda': 2 ** 26}  # noqa: RUF012 - read only
    # So many bytes of a GPU's memory are there for each of them: ten layers, with gradients, and a reserve.
    BYTES_PER_ACTIVATION = 512
    # A chunk of fewer points costs more in calls than it gains in caches.
    MIN_CHUNK_POINTS = 1024
    adam_options = {'betas': (0.9, 0.999)}  # noqa: RUF012 - read only
    plain_on_gpu = False  # Whether `--backward auto` is plain on a GPU: for small networks only.

    def __init__(self):
        super().__init__()
        self.appearance = None  # A `ColorCorrection` if the photos differ in exposure.
        self.poses = None       # `PoseOffsets` if the poses are refined.

    def half_layers(self):
        """The layers that a bfloat16 evaluation computes in bfloat16; their weights are converted all at
        once."""
        return []

    def forward(self, points, viewdirs=None):
        """Points [N, 3] and unit directions [N, 3] or None to raw [N, 4 or more]: three colour logits and a
        density before its ReLU."""
        raise NotImplementedError

    def density(self, points):
        """The density before its ReLU [N] at `points` [N, 3], equal to `forward(points, …)[:, 3]`."""
        raise NotImplementedError

    def as_photographed(self, rgb, view):
        """Rendered colours [N, 3] as photos of the views [N] show them: unchanged without `appearance`."""
        return rgb if self.appearance is None else self.appearance(rgb, view)

    def with_refined_poses(self, batch):
        """A `Batch` with the rays of the refined poses: unchanged without `poses`."""
        return batch if self.poses is None else batch._replace(rays=self.poses(batch.rays, batch.view))

    def preferred_chunk(self, device):
        """How many points to compute at once on `device`, so that they fit its caches or its memory."""
        activations = by_device(self.CHUNK_ACTIVATIONS, device)
        if device.type == 'cuda':
            memory = torch.cuda.get_device_properties(device).total_memory
            activations = min(activations, memory // self.BYTES_PER_ACTIVATION)
        return max(self.MIN_CHUNK_POINTS, activations // self.W)

    def reset_parameters(self):
        """Reinitialise all layers and encodings. A network with parameters of its own overrides this."""
        if any(True for _ in self.parameters(recurse=False)):
            raise NotImplementedError(f'{type(self).__name__} has parameters of its own: override '
                                      'reset_parameters')
        for module in self.modules():
            if module is not self and any(True for _ in module.parameters(recurse=False)):
                module.reset_parameters()


class EncodedNeRF(RadianceField, NeRF):
    """A `NeRF` that encodes its inputs itself. It inherits the layers, so that its checkpoints are those of a
    `NeRF`.

    Args:
      encoding: module that encodes positions, [..., 3] to [..., input_ch].
      encoding_views: module that encodes directions, [..., 3] to [..., input_ch_views]; None without view
        directions.
      kwargs: for `NeRF`.
    """

    # On a CPU, the activations of several layers fit its caches.
    CHUNK_ACTIVATIONS = {'cpu': 2 ** 20, 'cuda': 2 ** 26}  # noqa: RUF012 - read only

    def __init__(self, encoding, encoding_views=None, **kwargs):
        NeRF.__init__(self, **kwargs)
        self.encoding, self.encoding_views = encoding, encoding_views
        self.appearance = self.poses = None

    def forward(self, points, viewdirs=None):
        encoded = in_float32(self.encoding, points)
        if self.use_viewdirs:
            encoded = torch.cat([encoded, in_float32(self.encoding_views, viewdirs)], -1)
        return NeRF.forward(self, encoded.to(self.pts_linears[0].weight.dtype))

    def half_layers(self):
        return [*self.pts_linears, *([self.feature_linear, *self.views_linears] if self.use_viewdirs else [])]

    def input_widths(self):
        """For each of `half_layers` the sizes of the parts that its input is concatenated from."""
        W, D = self.W, self.D
        widths = [[self.input_ch], *([self.input_ch, W] if i in self.skips else [W] for i in range(D - 1))]
        return [*widths, *([[W], [W, self.input_ch_views]] if self.use_viewdirs else [])]

    def density(self, points):
        h = self.features(in_float32(self.encoding, points).to(self.pts_linears[0].weight.dtype))
        if self.use_viewdirs:
            return in_float32(self.alpha_linear, h)[..., 0]
        return in_float32(self.output_linear, h)[..., 3]


class BoundedModule(nn.Module):
    """A module that covers a bounding box, such as a grid. Training sets the box to that of the scene.

    Buffers:
      aabb: lowest and highest corner of the box, [2, 3].
    """

    def __init__(self):
        super().__init__()
        self.register_buffer('aabb', torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))

    def set_aabb(self, aabb, possible=None):
        """Use the box `aabb` [2, 3].

        Args:
          possible: cells of the box that can hold anything, bool [G, G, G]; None for all.
        """
        self.aabb.copy_(torch.as_tensor(aabb))

    def half_side(self):
        """Half the mean side of the box, a scalar tensor."""
        return 0.5 * (self.aabb[1] - self.aabb[0]).mean()


# --- networks on many points, as nerf-pytorch evaluates them ------------------------------------------------

def batchify(fn, chunk):
    """`fn` applied to `chunk` rows at a time; `fn` itself if chunk is None."""
    if chunk is None:
        return fn

    def fn_in_chunks(inputs):
        return torch.cat([fn(part) for part in inputs.split(chunk)])
    return fn_in_chunks


def run_network(inputs, viewdirs, fn, embed_fn, embeddirs_fn, netchunk=1024 * 64):
    """Encode points (and directions) and apply a network on encoded inputs, such as `NeRF`. A network that
    encodes its inputs itself is evaluated by `NetworkQuery` instead.

    Args:
      inputs: points [N_rays, N_samples, 3].
      viewdirs: unit directions [N_rays, 3], or None.
      fn: network on encoded inputs, [N, encoded] -> [N, C].
      embed_fn, embeddirs_fn: encodings of points and of directions.
      netchunk: points to compute at once, encoding included.
    Returns:
      raw [N_rays, N_samples, C].
    """
    points = inputs.reshape(-1, inputs.shape[-1])                                      # [N, 3]
    if viewdirs is not None:
        viewdirs = viewdirs[:, None].expand(inputs.shape).reshape(-1, 3)
        points = torch.cat([points, viewdirs], -1)                                     # [N, 6]

    def encode_and_apply(points):
        encoded = embed_fn(points[:, :3])
        if viewdirs is not None:
            encoded = torch.cat([encoded, embeddirs_fn(points[:, 3:])], -1)
        return fn(encoded)
    raw = batchify(encode_and_apply, netchunk)(points)
    return raw.reshape(*inputs.shape[:-1], raw.shape[-1])


# --- rays ---------------------------------------------------------------------------------------------------

def pixel_rays(x, y, K, c2w):
    """Rays through given points of the image plane.

    Args:
      x, y: image coordinates in pixels, [...]; (0, 0) is the upper left corner of the upper left pixel.
      K: intrinsics [3, 3].
      c2w: camera to world, [3, 4] or one for each point, [..., 3, 4].
    Returns:
      rays_o, rays_d: [..., 3] each, in world space.
    """
    return cast_rays(pinhole_directions(x, y, K[0][0], K[1][1], K[0][2], K[1][2]), c2w)


def pinhole_directions(x, y, fx, fy, cx, cy):
    """Directions [..., 3] in the camera's axes, with z = -1, to points x, y [...] of the image plane; focal
    lengths and principal point are numbers or [...], in pixels."""
    dirs = [(x - cx) / fx, (cy - y) / fy]
    return torch.stack([*dirs, torch.full_like(dirs[0], -1.0)], -1)


def cast_rays(dirs, c2w):
    """Rays from directions [..., 3] in the camera's axes; see `pixel_rays`."""
    rays_d = torch.sum(dirs[..., None, :] * c2w[..., :3, :3], -1)  # the camera's axes are the columns of c2w
    return c2w[..., :3, 3].expand(rays_d.shape), rays_d


def get_rays(H, W, K, c2w, pixel_centers=False):
    """Rays through all pixels of an image, rays_o and rays_d [H, W, 3]; through the pixels' upper left
    corners (i, j), as in nerf-pytorch, or through their centres (i + .5, j + .5)."""
    c2w, shift = torch.as_tensor(c2w), 0.5 if pixel_centers else 0.0
    rows, columns = (torch.arange(count, device=c2w.device, dtype=c2w.dtype) + shift for count in (H, W))
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    return pixel_rays(x, y, K, c2w)


def get_rays_np(H, W, K, c2w):
    """`get_rays` with NumPy arrays, as in nerf-pytorch."""
    rays_o, rays_d = get_rays(H, W, K, torch.from_numpy(np.asarray(c2w, np.float32)))
    return rays_o.numpy(), rays_d.numpy()


def ndc_rays(H, W, focal, near, rays_o, rays_d):
    """Rays of a forward-facing scene in normalised device coordinates (Appendix C, Eq. 25 and 26).

    The frustum behind the plane z = -near becomes a cube: t = 0 lies on that plane, t = 1 at infinity.

    Args:
      H, W, focal: image size and focal length in pixels.
      near: distance of the near plane.
      rays_o, rays_d: [..., 3] in camera space of the reference camera.
    Returns:
      rays_o, rays_d: [..., 3] in NDC.
    """
    d_z = rays_d[..., 2]
    # rays parallel to the plane never meet it
    d_z = torch.where(d_z.abs() < 1e-9, torch.full_like(d_z, -1e-9), d_z)
    rays_d = torch.cat([rays_d[..., :2], d_z[..., None]], -1)
    t = -(near + rays_o[..., 2]) / d_z
    rays_o = rays_o + t[..., None] * rays_d  # start on the near plane

    scale_x, scale_y = -2.0 * focal / W, -2.0 * focal / H
    x_z, y_z = rays_o[..., 0] / rays_o[..., 2], rays_o[..., 1] / rays_o[..., 2]
    origin = torch.stack([scale_x * x_z, scale_y * y_z, 1.0 + 2.0 * near / rays_o[..., 2]], -1)
    direction = torch.stack([scale_x * (rays_d[..., 0] / d_z - x_z),
                             scale_y * (rays_d[..., 1] / d_z - y_z),
                             -2.0 * near / rays_o[..., 2]], -1)
    return origin, direction


def ndc_positions(near, rays_o, rays_d, t):
    """Positions t [...] along rays [..., 3] to those along the rays that `ndc_rays` returns for them, 0 on
    the near plane and 1 at infinity; [...]."""
    return 1.0 + near / (rays_o[..., 2] + t * rays_d[..., 2])


def positions_from_ndc(near, rays_o, rays_d, t):
    """The inverse of `ndc_positions`: [...], infinity where t is 1 or more."""
    return torch.where(t < 1, (near / (t - 1.0) - rays_o[..., 2]) / rays_d[..., 2], torch.inf)


def split_rays(ray_batch):
    """Rays [N, 8 or 11] as `render` makes them to rays_o, rays_d [N, 3], near, far [N, 1], viewdirs [N, 3] or
    None."""
    viewdirs = ray_batch[:, 8:11] if ray_batch.shape[-1] > 8 else None
    return ray_batch[:, 0:3], ray_batch[:, 3:6], ray_batch[:, 6:7], ray_batch[:, 7:8], viewdirs


# --- disparity ----------------------------------------------------------------------------------------------

def disparity(depth_map, acc_map):
    """The inverse of the mean depth of rays, and 0 for empty ones: depth_map, acc_map [N_rays] as
    `raw2outputs` returns them, to [N_rays]. Values and gradients are finite."""
    empty = acc_map < MIN_OPACITY
    mean_depth = depth_map / acc_map.masked_fill(empty, 1.0)
    return mean_depth.clamp(min=MIN_DEPTH).reciprocal().masked_fill(empty, 0.0)


# --- samples along rays (Sec. 4 and 5.2) --------------------------------------------------------------------

def weights_of(optical_depth):
    """The weights T_i (1 - exp(-tau_i)) of Eq. 3 of intervals with optical depths tau = sigma * delta;
    [..., N_samples] both."""
    # T_i = exp(-sum_{j<i} tau_j): a product of (1 - alpha) would lose gradients
    in_front = F.pad(torch.cumsum(optical_depth[..., :-1], -1), (1, 0))
    return torch.exp(-in_front) * (1.0 - torch.exp(-optical_depth))


def fixed_uniform(shape, like):
    """NumPy's fixed uniform numbers in [0, 1) in place of torch's: what `pytest=True` stands for."""
    return torch.as_tensor(np.random.RandomState(0).rand(*shape), dtype=like.dtype, device=like.device)


def stratified_samples(near, far, N_samples, lindisp, perturb, pytest):
    """Positions of the coarse samples of rays (Eq. 2, as nerf-pytorch computes it): evenly spaced from near
    to far, both included; with `perturb` each is drawn uniformly between the midpoints to its neighbours.

    Args:
      near, far: bounds [N_rays, 1].
      lindisp: space them evenly in disparity instead of depth.
      perturb: more than 0 for random positions.
      pytest: use NumPy's fixed random numbers in place of torch's.
    Returns:
      z_vals [N_rays, N_samples], ascending.
    """
    t_vals = torch.linspace(0.0, 1.0, N_samples, dtype=near.dtype, device=near.device)
    if lindisp:
        z_vals = 1.0 / (1.0 / near * (1.0 - t_vals) + 1.0 / far * t_vals)
    else:
        z_vals = near * (1.0 - t_vals) + far * t_vals
    if perturb > 0:
        mids = 0.5 * (z_vals[..., 1:] + z_vals[..., :-1])
        upper = torch.cat([mids, z_vals[..., -1:]], -1)
        lower = torch.cat([z_vals[..., :1], mids], -1)
        t_rand = fixed_uniform(z_vals.shape, z_vals) if pytest else torch.rand_like(z_vals)
        z_vals = lower + (upper - lower) * t_rand
    return z_vals


def sample_pdf(bins, weights, N_samples, det=False, pytest=False):
    """Sample the piecewise constant density that `weights` define over `bins`, by inverse-transform sampling.

    Args:
      bins: edges of the intervals, [..., M + 1], ascending.
      weights: of the intervals, [..., M]; not negative, need not sum to 1.
      N_samples: samples per ray.
      det: use evenly spaced quantiles instead of random ones.
      pytest: use NumPy's fixed random numbers in place of torch's.
    Returns:
      samples [..., N_samples], ascending where det is true.
    """
    weights = weights + PDF_EPS
    pdf = weights / weights.sum(-1, keepdim=True)
    cdf = torch.cumsum(pdf, -1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], -1)  # [..., M + 1]

    shape = [*cdf.shape[:-1], N_samples]
    if det:
        u = torch.linspace(0.0, 1.0, N_samples, dtype=cdf.dtype, device=cdf.device).expand(shape)
    elif pytest:
        u = fixed_uniform(shape, cdf)
    else:
        u = torch.rand(shape, dtype=cdf.dtype, device=cdf.device)

    return invert_cdf(bins, cdf, u)


def invert_cdf(bins, cdf, u):
    """Where a piecewise linear cumulative distribution has the values `u`.

    Args:
      bins: edges of the intervals, [..., M + 1], ascending.
      cdf: its values there, [..., M + 1], from 0 to 1.
      u: quantiles [..., N] in [0, 1].
    Returns:
      [..., N].
    """
    above = torch.searchsorted(cdf, u.contiguous(), right=True)  # the first edge whose cdf is greater than u
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=cdf.shape[-1] - 1)
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    bin_below, bin_above = bins.gather(-1, below), bins.gather(-1, above)

    probability = cdf_above - cdf_below
    probability = torch.where(probability < MIN_PROBABILITY, torch.ones_like(probability), probability)
    return bin_below + (u - cdf_below) / probability * (bin_above - bin_below)
