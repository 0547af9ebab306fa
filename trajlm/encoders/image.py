"""Chest X-rays: a plain convolutional network."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn

from trajlm.config import EncoderConfig
from trajlm.encoders.augment import picture
from trajlm.encoders.base import Hidden, ProjectedEncoder, linear_head
from trajlm.views import ImageView

# ImageNet's statistics, averaged over colours for greyscale pictures.
PIXEL_MEAN, PIXEL_STD = 0.449, 0.226


class ImageCNN(ProjectedEncoder):
    """Four strided convolutions, mean pooling, LayerNorm. No pretrained weights.

    Tokens are the places of the last map, row by row; the levels are the mean of every block's map.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, config.hidden_width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GroupNorm(math.gcd(8, wide), wide), nn.ReLU()
            )
            for narrow, wide in pairwise(widths)
        )
        self.augment = config.augment
        self.project = linear_head(widths[-1], config)
        self.level_widths = widths[1:]

    def read(self, view: ImageView, levels: bool) -> Hidden:
        """See :class:`ProjectedEncoder`."""
        maps, found = (picture(view, self.training and self.augment) - PIXEL_MEAN) / PIXEL_STD, []
        for block in self.blocks:
            maps = block(maps)
            if levels:
                found.append(maps.mean(dim=(2, 3)))
        parts = maps.flatten(start_dim=2).mT
        return Hidden(parts.mean(dim=1), parts, parts.new_ones(parts.shape[:2], dtype=torch.bool), found)
