"""Figures of others for the scenes of the NeRF paper, and how they were measured.

Sources: Mildenhall et al. 2020 (NeRF); the README of JaxNeRF; nerfacc's documentation; Müller et al. 2022
(instant-ngp); Chen et al. 2022 (TensoRF).
"""
from typing import NamedTuple


class Method(NamedTuple):
    """A published row of a table."""
    name: str
    protocol: tuple   # images, test views, background, hardware and training time of a scene
    metrics: dict     # for psnr, ssim, lpips: a dict of the values of the scenes, and 'mean'


def blender(*values):
    """Values of the eight scenes of the Blender set and their mean, by name."""
    names = 'chair', 'drums', 'ficus', 'hotdog', 'lego', 'materials', 'mic', 'ship', 'mean'
    return dict(zip(names, values, strict=True))


def llff(*values):
    """Values of the eight scenes of the LLFF set and their mean, by name."""
    names = 'fern', 'flower', 'fortress', 'horns', 'leaves', 'orchids', 'room', 'trex', 'mean'
    return dict(zip(names, values, strict=True))


# The published methods of each table.
PUBLISHED = {
    'blender': [
        Method('NeRF', ('800×800', '200', 'white', 'V100, 1 to 2 days'), {
            'psnr': blender(33.00, 25.01, 30.13, 36.18, 32.54, 29.62, 32.91, 28.65, 31.01),
            'ssim': blender(.967, .925, .964, .974, .961, .949, .980, .856, .947),
            'lpips': blender(.046, .091, .044, .121, .050, .063, .028, .206, .081)}),
        Method('JaxNeRF', ('800×800', '200', 'white', '128 TPUv2 cores, 2.5 h'), {
            'psnr': blender(34.08, 25.03, 30.43, 36.92, 33.28, 29.91, 34.53, 29.36, 31.69)}),
        Method('nerfacc, MLP and grid', ('800×800', '200', 'white', 'TITAN RTX, 52 min'), {
            'psnr': blender(33.32, 25.39, 32.52, 35.80, 33.69, 29.73, 33.76, 28.18, 31.55)}),
        Method('nerfacc, hash grid', ('800×800', '200', 'white', 'TITAN RTX, 4.5 min'), {
            'psnr': {'lego': 35.67, 'mean': 33.11}}),
        Method('instant-ngp', ('800×800', '200', 'black', 'RTX 3090, 5 min'), {
            'psnr': blender(35.00, 26.02, 33.51, 37.40, 36.39, 29.78, 36.22, 31.10, 33.18)})],
    'llff': [
        Method('NeRF', ('1008×756', 'every 8th', 'black', 'V100, 1 to 2 days'), {
            'psnr': llff(25.17, 27.40, 31.16, 27.45, 20.92, 20.36, 32.70, 26.80, 26.50),
            'ssim': llff(.792, .827, .881, .828, .690, .641, .948, .880, .811),
            'lpips': llff(.280, .219, .171, .268, .316, .321, .178, .249, .250)}),
        Method('JaxNeRF', ('1008×756', 'every 8th', 'black', '128 TPUv2 cores, 2.5 h'), {
            'psnr': llff(24.83, 28.07, 31.76, 28.10, 21.23, 20.27, 33.04, 27.42, 26.84)}),
        Method('TensoRF', ('1008×756', 'every 8th', 'black', '–'), {'psnr': {'mean': 26.73}})]}
