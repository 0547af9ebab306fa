"""Encoders by name: one file per kind. A view of N present inputs goes in, ``float[N, D]`` latents come out.

A new encoder is one class (:class:`trajlm.encoders.base.Encoder`) and one line in ``ENCODERS``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from torch import nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Encoder
from trajlm.encoders.convolution import TemporalConvolution
from trajlm.encoders.image import ImageCNN
from trajlm.encoders.image_tower import LIBRARIES, ImageTower
from trajlm.encoders.series import Recurrent
from trajlm.encoders.tabular import TabularMLP
from trajlm.encoders.text import HashedText
from trajlm.encoders.text_tower import PRESETS, TextTower
from trajlm.encoders.transformer import SeriesTransformer
from trajlm.encoders.triplets import TripletEncoder
from trajlm.errors import TrajlmError
from trajlm.schema import FittedFeature, Modality

# name -> (kind of modality, builder from the modality's features and the settings)
ENCODERS: dict[str, tuple[str, Callable[[Sequence[FittedFeature], EncoderConfig], Encoder]]] = {
    "mlp": ("numeric", TabularMLP),
    "lstm": ("numeric", lambda features, config: Recurrent(nn.LSTM, features, config)),
    "gru": ("numeric", lambda features, config: Recurrent(nn.GRU, features, config)),
    "tcn": ("numeric", TemporalConvolution),
    "transformer": ("numeric", SeriesTransformer),
    "mufuse": ("numeric", TripletEncoder),
    "hashed-text": ("text", lambda _, config: HashedText(config)),
    "cnn": ("image", lambda _, config: ImageCNN(config)),
}
DEFAULTS = {"numeric": "lstm", "text": "hashed-text", "image": "cnn"}


def build_encoder(modality: Modality, features: Sequence[FittedFeature], config: EncoderConfig) -> Encoder:
    """The encoder that the settings name for a modality, or the default of its kind.

    A text modality also takes a preset, a hub id or a local folder of a Hugging Face encoder; an image modality
    LIBRARY:MODEL[:WEIGHTS]. Raises TrajlmError for a name that is not known or is of another kind.
    """
    default = "mlp" if modality.static else DEFAULTS[modality.kind]
    name = config.by_modality.get(modality.name, default)
    tuning = config.tuning_by_modality.get(modality.name)
    if name in ENCODERS:
        kind, build = ENCODERS[name]
        if kind != modality.kind:
            raise TrajlmError(f"encoder {name!r} reads {kind} inputs, modality {modality.name!r} is {modality.kind}")
        if tuning:
            raise TrajlmError(
                f"encoder.tuning_by_modality names {modality.name}, whose encoder {name!r} holds no pretrained weights "
                "and is trained in any case"
            )
        return build(features, config)
    if modality.kind == "text" and (name in PRESETS or "/" in name):
        return TextTower(name, config, tuning or "frozen")
    if modality.kind == "image" and name.partition(":")[0] in LIBRARIES:
        return ImageTower(name, config, tuning)
    fitting = [known for known, (kind, _) in ENCODERS.items() if kind == modality.kind]
    fitting += {"text": [*PRESETS], "image": [f"{library}:" for library in LIBRARIES]}.get(modality.kind, [])
    nearest = difflib.get_close_matches(name, fitting, n=1, cutoff=0.0)[0]
    raise TrajlmError(
        f"encoder.by_modality.{modality.name}: {name!r} is not known; the nearest is {nearest!r}, all for "
        f"{modality.kind} inputs are {', '.join(fitting)}"
    )
