"""Chest X-rays: a plain convolutional network, with the paper's augmentations in training."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trajlm.config import EncoderConfig
from trajlm.views import ImageView

# ImageNet's statistics, averaged over colours for greyscale pictures.
PIXEL_MEAN, PIXEL_STD = 0.449, 0.226


def augment(pixels: Tensor) -> Tensor:
    """Random resized crop, horizontal flip, affine and brightness and contrast jitter of 0.2 (A.1.5).

    Args:
        pixels: float[N, 1, P, P] in [0, 1].

    Returns:
        float[N, 1, P, P]; one random map per picture, sampled in a single bilinear step.
    """
    n, device = len(pixels), pixels.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, device=device).uniform_(low, high)

    scale = uniform(0.8, 1.0).sqrt() * uniform(0.95, 1.05)
    angle = uniform(-10, 10) * math.pi / 180
    flip = torch.where(torch.rand(n, device=device) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    affine = torch.stack([cos * flip, -sin, uniform(-0.1, 0.1), sin * flip, cos, uniform(-0.1, 0.1)], dim=-1).view(
        n, 2, 3
    )
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast, brightness = uniform(0.8, 1.2).view(n, 1, 1, 1), uniform(0.8, 1.2).view(n, 1, 1, 1)
    mean = moved.mean(dim=(2, 3), keepdim=True)
    return ((moved - mean) * contrast + mean * brightness).clamp(0, 1)


class ImageCNN(nn.Module):
    """Four strided convolutions, mean pooling, LayerNorm. No pretrained weights."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, config.hidden_width)
        blocks: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            blocks += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(min(8, wide), wide), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.project = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(widths[-1], config.latent_width), nn.LayerNorm(config.latent_width)
        )

    def forward(self, view: ImageView) -> Tensor:
        """float[N, D] latents of N pictures."""
        pixels = view.pixels[:, None].float() / 255
        if self.training:
            pixels = augment(pixels)
        return self.project(self.blocks((pixels - PIXEL_MEAN) / PIXEL_STD).mean(dim=(2, 3)))
