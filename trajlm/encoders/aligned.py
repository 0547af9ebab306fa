"""All encoders of a cohort with their missing tokens: what pretraining makes and fine-tuning freezes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trajlm.alignment import inject_missing_tokens
from trajlm.config import EncoderConfig
from trajlm.dataset import StayBatch
from trajlm.encoders import build_encoder
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
        self.features = {m.name: sum(f.modality == m.name for f in features) for m in modalities}
        self.encoders = nn.ModuleDict({m.name: build_encoder(m, self.features[m.name], config) for m in modalities})
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

    def forward(self, batch: StayBatch) -> Tensor:
        """float[B, M, D]: latents where present, missing tokens elsewhere; absent encoders never run (Eq. 1)."""
        if batch.modalities != self.modalities:
            raise ValueError(f"expected modalities {self.modalities}, came {batch.modalities}")
        latents = self.missing_tokens.new_zeros(*batch.present.shape, self.latent_width)
        for column, name in enumerate(self.modalities):
            if name in batch.views and len(batch.views[name]):
                latents[batch.present[:, column], column] = self.encode(name, batch.views[name]).to(latents.dtype)
        return inject_missing_tokens(latents, batch.present, self.missing_tokens)
