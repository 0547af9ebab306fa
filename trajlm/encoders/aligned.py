"""All encoders of a cohort with their missing tokens: what pretraining makes and fine-tuning freezes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trajlm.alignment import inject_missing_tokens
from trajlm.config import EncoderConfig
from trajlm.dataset import StayBatch
from trajlm.encoders import build_encoder
from trajlm.encoders.base import Encoding
from trajlm.encoders.numeric import last_step
from trajlm.schema import FittedFeature, Modality
from trajlm.views import STATE_PARTS, NumericView, View, single_events

Reach = Literal["own", "history", "both"]


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
        return STATE_PARTS * max(self.features.values())

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

    def event_width(self, reach: Reach) -> int:
        """Width of :meth:`event_latents`: D, or 2 D where both are read."""
        return self.latent_width * (2 if reach == "both" else 1)

    def event_latents(self, modality: str, view: View, reach: Reach) -> Tensor:
        """float[E, W] latents of the E events of one modality, in order.

        Args:
            modality: name.
            view: stays as series of their events; notes and pictures each as an input of its own.
            reach: whether an encoder sees an event alone (own), all events of the stay up to it (history) or both, one
                beside the other. The past of encoders that do not read in order (``reads_in_order``) is left out: an
                event is its whole history there.
        """
        parts = []
        if reach != "history" or not self.reads_history(modality):
            parts.append(self.encode(modality, single_events(view)))
        if reach != "own":
            parts.append(self._running(modality, view) if self.reads_history(modality) else parts[0])
        return torch.cat(parts[: 2 if reach == "both" else 1], dim=-1)

    def _running(self, modality: str, view: View) -> Tensor:
        encoding = self.encoding(modality, view, tokens=True)
        assert encoding.tokens is not None
        assert encoding.token_present is not None
        return encoding.tokens[encoding.token_present]

    def advance(
        self, modality: str, view: View, reach: Reach, carried: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """float[N, W]: :meth:`event_latents` of the next event of N stays, and what the one after it needs.

        Args:
            modality: name.
            view: one event of each stay.
            reach: as for :meth:`event_latents`.
            carried: what the call on the event of this modality before returned; None at the first.
        """
        encoder: Any = self.encoders[modality]
        if reach == "own" or not encoder.reads_in_order:
            own = self.encode(modality, view)
            return own.repeat(1, 2) if reach == "both" else own, None
        running, carried = encoder.advance(view, carried)
        if reach == "history":
            return running, carried
        return torch.cat([self.encode(modality, view), running], dim=-1), carried

    def reads_history(self, modality: str) -> bool:
        """Whether the modality's encoder tells of its past, and not of one event alone."""
        return bool(self.encoders[modality].reads_in_order)

    def missing_latents(self, reach: Reach) -> Tensor:
        """float[M, W]: what stands for the event of a modality that a stay lacks."""
        return self.missing_tokens.repeat(1, 2) if reach == "both" else self.missing_tokens

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
