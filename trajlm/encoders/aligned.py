"""All encoders of a cohort with their missing tokens: what pretraining makes and fine-tuning freezes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trajlm.alignment import inject_missing_tokens
from trajlm.config import EncoderConfig
from trajlm.dataset import StayBatch
from trajlm.encoders import build_encoder
from trajlm.encoders.base import Encoding
from trajlm.encoders.numeric import last_step
from trajlm.schema import FittedFeature, Modality
from trajlm.views import NumericView, View


class AlignedEncoders(nn.Module):
    """One encoder and one learnable missing token per modality.

    Attributes:
        modalities: names, the order of the M axis everywhere.
        features: by modality how many features it measures; 0 for notes and pictures.
        missing_tokens: float[M, D].
    """

    def __init__(
        self, modalities: Sequence[Modality], features: Sequence[FittedFeature], config: EncoderConfig
    ) -> None:
        super().__init__()
        self.modalities = tuple(m.name for m in modalities)
        self.latent_width = config.latent_width
        own = {m.name: [f for f in features if f.modality == m.name] for m in modalities}
        self.features = {name: len(measured) for name, measured in own.items()}
        self.encoders = nn.ModuleDict({m.name: build_encoder(m, own[m.name], config) for m in modalities})
        self.missing_tokens = nn.Parameter(torch.randn(len(self.modalities), config.latent_width))

    @property
    def state_width(self) -> int:
        """Width V of :meth:`carried_state`: what the modality with the most features needs."""
        return 3 * max(self.features.values())

    def carried_state(self, view: View) -> Tensor:
        """float[N, V]: the carried-forward state after the last step of N inputs; zero beyond the modality's own.

        Notes and pictures have none.
        """
        state = self.missing_tokens.new_zeros(len(view), self.state_width)
        if isinstance(view, NumericView):
            known = view.state[last_step(view)]
            state[:, : known.shape[1]] = known
        return state

    def encode(self, modality: str, view: View) -> Tensor:
        """float[N, D] latents of the N inputs of one modality."""
        return self.encoders[modality](view)

    def encoding(self, modality: str, view: View, *, tokens: bool = False, levels: bool = False) -> Encoding:
        """Latents of N inputs and, where asked for, their tokens and levels: what fusions of other systems read."""
        encoder: Any = self.encoders[modality]
        return encoder.encode(view, tokens=tokens, levels=levels)

    def forward(self, batch: StayBatch) -> Tensor:
        """float[B, M, D]: latents where present, missing tokens elsewhere; absent encoders never run (Eq. 1)."""
        if batch.modalities != self.modalities:
            raise ValueError(f"expected modalities {self.modalities}, came {batch.modalities}")
        latents = self.missing_tokens.new_zeros(*batch.present.shape, self.latent_width)
        for column, name in enumerate(self.modalities):
            if name in batch.views and len(batch.views[name]):
                latents[batch.present[:, column], column] = self.encode(name, batch.views[name]).to(latents.dtype)
        return inject_missing_tokens(latents, batch.present, self.missing_tokens)
