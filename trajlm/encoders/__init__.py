"""Encoders by name: one file per kind of input. A view of N present inputs goes in, ``float[N, D]`` latents come out.

A new encoder is one class and one line in ``ENCODERS``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn

from trajlm.config import EncoderConfig
from trajlm.encoders.image import ImageCNN
from trajlm.encoders.series import SeriesLSTM
from trajlm.encoders.tabular import TabularMLP
from trajlm.encoders.text import FrozenText, HashedText
from trajlm.errors import TrajlmError
from trajlm.schema import Modality

# name -> (kind of modality, builder from the number of features and the settings)
ENCODERS: dict[str, tuple[str, Callable[[int, EncoderConfig], nn.Module]]] = {
    "mlp": ("numeric", TabularMLP),
    "lstm": ("numeric", SeriesLSTM),
    "hashed-text": ("text", lambda _, config: HashedText(config)),
    "minilm-l6": ("text", lambda _, config: FrozenText("minilm-l6", config)),
    "cnn": ("image", lambda _, config: ImageCNN(config)),
}
DEFAULTS = {"numeric": "lstm", "text": "hashed-text", "image": "cnn"}


def build_encoder(modality: Modality, features: int, config: EncoderConfig) -> nn.Module:
    """The encoder that the settings name for a modality, or the default of its kind.

    A text modality also takes a hub id or a local folder of a Hugging Face encoder. Raises TrajlmError for a name that
    is not known or is of another kind.
    """
    default = "mlp" if modality.static else DEFAULTS[modality.kind]
    name = config.by_modality.get(modality.name, default)
    if name in ENCODERS:
        kind, build = ENCODERS[name]
        if kind != modality.kind:
            raise TrajlmError(f"encoder {name!r} reads {kind} inputs, modality {modality.name!r} is {modality.kind}")
        return build(features, config)
    if modality.kind == "text" and ("/" in name):
        return FrozenText(name, config)
    fitting = [known for known, (kind, _) in ENCODERS.items() if kind == modality.kind]
    nearest = difflib.get_close_matches(name, fitting, n=1, cutoff=0.0)[0]
    raise TrajlmError(
        f"encoder.by_modality.{modality.name}: {name!r} is not known; the nearest is {nearest!r}, all for "
        f"{modality.kind} inputs are {', '.join(fitting)}"
    )
