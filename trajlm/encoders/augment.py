"""Pictures as an image encoder reads them, in training each time seen a little differently (paper, A.1.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from trajlm.views import ImageView

CROP_SHARE = (0.8, 1.0)  # of the area
CROP_ASPECT = (0.9, 1.1)
ROTATION_DEGREES = 10.0
SHIFT = 0.05  # of half the side
JITTER = 0.2  # of brightness and contrast; a greyscale picture has no saturation and no hue


def picture(view: ImageView, augmented: bool) -> Tensor:
    """float[N, 1, P, P] in [0, 1]; ``augmented`` draws from torch's generator, which the training loop seeds."""
    pixels = view.pixels[:, None].float() / 255
    return augment(pixels) if augmented else pixels


def augment(pixels: Tensor) -> Tensor:
    """Random resized crop, horizontal flip, affine and colour jitter.

    Args:
        pixels: float[N, 1, P, P] in [0, 1].

    Returns:
        float[N, 1, P, P] in [0, 1]; one random map per picture, sampled in a single bilinear step.
    """
    moved = resample(pixels, random_maps(len(pixels), pixels.device))
    contrast, brightness = (_uniform(len(pixels), 1 - JITTER, 1 + JITTER, pixels.device) for _ in range(2))
    return jitter(moved, contrast, brightness)


def _uniform(n: int, low: float, high: float, device: torch.device) -> Tensor:
    return torch.empty(n, device=device).uniform_(low, high)


def random_maps(n: int, device: torch.device) -> Tensor:
    """float[N, 2, 3]: where in a picture, whose sides span [-1, 1], each place of the augmented one comes from."""
    share = _uniform(n, *CROP_SHARE, device)
    aspect = _uniform(n, *CROP_ASPECT, device).sqrt()
    width, height = (share.sqrt() * aspect).clamp_max(1.0), (share.sqrt() / aspect).clamp_max(1.0)
    across, down = (_uniform(n, -1.0, 1.0, device) for _ in range(2))
    flip = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    angle = _uniform(n, -ROTATION_DEGREES, ROTATION_DEGREES, device) * math.pi / 180
    cos, sin = torch.cos(angle), torch.sin(angle)
    shift_x, shift_y = (_uniform(n, -SHIFT, SHIFT, device) for _ in range(2))
    # The crop lies anywhere within the picture; the affine part may reach over its border.
    centre_x, centre_y = across * (1 - width) + shift_x, down * (1 - height) + shift_y
    rows = [cos * width * flip, -sin * height, centre_x, sin * width * flip, cos * height, centre_y]
    return torch.stack(rows, dim=-1).view(n, 2, 3)


def resample(pixels: Tensor, maps: Tensor) -> Tensor:
    """float[N, C, P, P] pictures read where ``maps`` float[N, 2, 3] point; the border continues outwards."""
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def jitter(pixels: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """float[N, C, P, P] in [0, 1]: deviations from the mean times ``contrast``, the mean times ``brightness`` [N]."""
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    spread = (pixels - mean) * contrast.view(-1, 1, 1, 1)
    return (spread + mean * brightness.view(-1, 1, 1, 1)).clamp(0, 1)
