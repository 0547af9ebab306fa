"""The sequence model: events and [PREDICT]s through a causal LLM, a belief after every event (paper, 3.4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor, nn

from trajlm.backbones import hidden_width, text_config, token_embeddings, traits, use_attention
from trajlm.belief_tables import batch_beliefs
from trajlm.encoders.aligned import AlignedEncoders, Reach
from trajlm.errors import TrajlmError
from trajlm.latents import TrajectoryBatch
from trajlm.linear_readout import LinearReadout
from trajlm.packing import SequenceReader
from trajlm.reading import NewestFusion, Projector, WaveEncoding, counted_readouts, to_width
from trajlm.schema import FittedFeature, Modality, Timeline
from trajlm.tasks import Task
from trajlm.timelines import TimelineReader
from trajlm.tree_readout import TreeReadout

if TYPE_CHECKING:
    from trajlm.streaming import BeliefStream, BeliefStreams


@dataclass
class TrajectoryOutput:
    """What the model computed, by name.

    Attributes:
        embeddings: float[B, P + 2S, H], the sequence the backbone read: the P tokens of a prompt, then event,
            [PREDICT], event, [PREDICT], ...
        hidden: float[B, S, H], the backbone's state at every [PREDICT].
        readouts: float[B, S, K], one per task, before it becomes a belief.
        predict_positions: int64[S], where the [PREDICT]s stand in the sequence.
    """

    embeddings: Tensor
    hidden: Tensor
    readouts: Tensor
    predict_positions: Tensor


def interleave(events: Tensor, predict: Tensor) -> tuple[Tensor, Tensor]:
    """Put a [PREDICT] after every event.

    Args:
        events: float[B, S, H].
        predict: float[H].

    Returns:
        float[B, 2S, H] and int64[S], the positions of the [PREDICT]s.
    """
    b, s, h = events.shape
    sequence = torch.stack([events, predict.expand(b, s, h)], dim=2).reshape(b, 2 * s, h)
    return sequence, torch.arange(1, 2 * s, 2, device=events.device)


class TrajectoryModel(nn.Module):
    """Frozen encoders, projectors, a learnable [PREDICT], a causal backbone, one head per task.

    Args:
        encoders: frozen here; they stay in evaluation mode.
        backbone: a decoder that takes ``inputs_embeds`` and returns ``last_hidden_state``.
        tasks: fitted tasks, in order.
        modalities, features, image_pixels: of the prepared folder the model was trained on, to read raw events.
        time_encoding: add to every event an encoding of the hours since admission (hours), of how many events came
            before it (order), or nothing (off).
        modality_embedding: add to every event a learned vector of its modality.
        prompt_ids: tokens of the backbone's vocabulary that stand before the first event.
        readout_at: which beliefs count, in the loss and in tables: all (event), or the last one up to every full hour
            (hour) or up to every landmark and the end (landmarks).
        landmarks: hours since admission, rising.
        reach: what an event's latent tells of: the event alone (own), its modality's events so far (history) or both.
        context: what an event brings along: nothing (own) or the newest event of every other modality (newest).
        inputs: what of an event is read: its latent, its latent and its carried-forward state (latent_and_state), or
            its state alone where it has one (state).
        running_mean: of a state read the mean of every feature's values so far as well.
        readout: what a belief is read from: the [PREDICT] position alone, or the event's own embedding as well.
        linear: outside training, average the read-outs with those of a regression (:mod:`trajlm.linear_readout`).
        trees: and with those of trees (:mod:`trajlm.tree_readout`).
        dropout: on events and read-outs, in training.
        input_dropout: on latents and states, in training.
        max_events: longest timeline (:func:`trajlm.latents.fits`); what is not read gets no belief.
        bf16: run the backbone under bfloat16 autocast in training.
        predict_visible: later positions may attend to earlier [PREDICT]s.
        flash: train under FlashAttention 2; beliefs are computed under sdpa in float32.

    Attributes:
        shares: float[P, K] of the ``components`` in a read-out outside training; of each task they sum to 1.
    """

    prompt_ids: Tensor
    shares: Tensor

    def __init__(
        self,
        encoders: AlignedEncoders,
        backbone: nn.Module,
        tasks: Sequence[Task],
        modalities: Sequence[Modality],
        features: Sequence[FittedFeature],
        image_pixels: int,
        time_encoding: str = "hours",
        modality_embedding: bool = False,
        prompt_ids: Sequence[int] = (),
        readout_at: str = "event",
        landmarks: Sequence[float] = (),
        context: str = "own",
        reach: Reach = "own",
        inputs: str = "latent",
        running_mean: bool = False,
        readout: str = "predict",
        linear: bool = False,
        trees: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        max_events: int = 1000,
        bf16: bool = False,
        predict_visible: bool = True,
        flash: bool = False,
    ) -> None:
        super().__init__()
        self.reading = {
            "time_encoding": time_encoding, "modality_embedding": modality_embedding, "prompt_ids": list(prompt_ids),
            "readout_at": readout_at, "landmarks": list(landmarks), "context": context, "inputs": inputs,
            "running_mean": running_mean, "readout": readout, "linear": linear, "trees": trees,
            "max_events": max_events, "predict_visible": predict_visible,
        }  # fmt: skip
        if prompt_ids and not predict_visible:
            raise TrajlmError("finetuning.prompt: not with finetuning.predict_visible false; leave one of them out")
        width = hidden_width(backbone)
        vocabulary = token_embeddings(backbone)
        scale = float(vocabulary.std())
        self.encoders, self.reach = encoders.requires_grad_(False).eval(), reach
        self.backbone = backbone
        self.sequence_reader = SequenceReader(text_config(backbone), traits(backbone), predict_visible)
        self.projectors = nn.ModuleDict(
            {
                m: Projector(
                    encoders.event_width(reach),
                    encoders.features[m] if inputs != "latent" else 0,
                    inputs != "state" or not encoders.features[m],
                    running_mean,
                    width,
                    input_dropout,
                )
                for m in encoders.modalities
            }
        )
        self.newest = NewestFusion(len(encoders.modalities), width) if context == "newest" else None
        # Fused events are all of one kind, single ones are of their modality's.
        mixed = ["fused"] if context == "newest" else list(encoders.modalities)
        self.mixers = nn.ModuleDict({m: to_width(width, scale) for m in mixed})
        self.dropout = nn.Dropout(dropout)
        self.predict = nn.Parameter(vocabulary.mean(dim=0) + scale * torch.randn(width))
        self.time_encoding = time_encoding
        self.time = WaveEncoding(width, scale) if time_encoding != "off" else None
        self.kinds = nn.Embedding(len(encoders.modalities), width) if modality_embedding else None
        if self.kinds is not None:
            nn.init.normal_(self.kinds.weight, std=0.1 * scale)
        self.register_buffer("prompt_ids", torch.tensor(list(prompt_ids), dtype=torch.long), persistent=False)
        self.readout_at, self.landmarks = readout_at, tuple(landmarks)
        self.tasks = nn.ModuleList(tasks)
        self.heads = nn.ModuleDict({t.target: _head(width, dropout) for t in tasks})
        direct = tasks if readout == "predict_and_event" else []
        self.event_heads = nn.ModuleDict({t.target: _head(width, dropout) for t in direct})
        widths = [self._projector(m).layer.in_features for m in encoders.modalities]
        self.linear = LinearReadout(widths, len(tasks)) if linear else None
        counts = [encoders.features[m] for m in encoders.modalities]
        self.trees = TreeReadout(counts, encoders.event_width(reach), len(tasks)) if trees else None
        evenly = [0.5**p for p in range(1, len(self.components))]
        shares = torch.tensor([*evenly[-1:], *evenly[::-1]] or [1.0])
        self.register_buffer("shares", shares[:, None].repeat(1, len(tasks)), persistent=len(shares) > 1)
        self.timelines = TimelineReader(encoders, modalities, features, image_pixels, reach)
        self.features, self.image_pixels = tuple(features), image_pixels
        self.max_events, self.bf16, self.flash = max_events, bf16, flash
        self.origin: dict[str, Any] | None = None  # settings and figures of the run it was loaded from

    def train(self, mode: bool = True) -> TrajectoryModel:
        """Training mode for all but the frozen encoders."""
        super().train(mode)
        self.encoders.eval()
        if self.flash:
            use_attention(self.backbone, "flash" if mode else "sdpa")
        return self

    @property
    def targets(self) -> list[str]:
        """Names of the targets, in the order of the read-outs."""
        return [task.target for task in self.fitted_tasks]

    @property
    def fitted_tasks(self) -> list[Task]:
        """The tasks, in the order of the read-outs."""
        return [task for task in self.tasks if isinstance(task, Task)]

    def embed(
        self,
        batch: TrajectoryBatch,
        places: Tensor | None = None,
        missing: Tensor | None = None,
        inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """float[B, S, H] embeddings of the events; every event goes through its modality's projector.

        Args:
            batch: the events.
            places: int64[B, S], how many events of its stay came before each; None counts those of the batch.
            missing: :meth:`missing_tokens`, where they are at hand.
            inputs: :meth:`inputs`, likewise.
        """
        inputs = self.inputs(batch) if inputs is None else inputs
        events = self.predict.new_zeros(*batch.present.shape, self.predict.shape[0])
        placed = 0
        for index, name in enumerate(self.encoders.modalities):
            chosen = (batch.modality == index) & batch.present
            projected = self._projector(name).project(inputs[index])
            if self.newest is None:
                projected = self.mixers[name](projected)
            events[chosen] = projected.to(events.dtype)
            placed += int(chosen.sum())
        if placed != int(batch.present.sum()):
            raise ValueError(f"{int(batch.present.sum())} events came, {placed} were embedded")
        hours = batch.hours.to(batch.latents.dtype)
        if self.newest is not None:
            tokens = self.missing_tokens() if missing is None else missing
            fused = self.newest(events, tokens, batch.modality, hours, batch.present)
            events = self.mixers["fused"](fused)
        if self.time is not None:
            counted = torch.arange(hours.shape[1], device=hours.device) if places is None else places
            when = hours if self.time_encoding == "hours" else counted.to(hours.dtype).expand_as(hours)
            events = events + self.time(when).to(events.dtype)
        if self.kinds is not None:
            events = events + self.kinds(batch.modality).to(events.dtype)
        return self.dropout(events)

    def behind_prompt(self, sequence: Tensor) -> Tensor:
        """float[B, P + T, H]: the prompt's P token embeddings before float[B, T, H]."""
        if not len(self.prompt_ids):
            return sequence
        backbone: Any = self.backbone
        tokens = backbone.get_input_embeddings()(self.prompt_ids).to(sequence.dtype)
        return torch.cat([tokens.expand(len(sequence), -1, -1), sequence], dim=1)

    def require_no_prompt(self, what: str) -> None:
        """Raise TrajlmError for something that takes the first position to be the first event's."""
        if len(self.prompt_ids):
            raise TrajlmError(f"{what}: not for a model with a prompt before its events; train one with prompt: null")

    def counted(self, batch: TrajectoryBatch) -> Tensor:
        """bool[B, S]: after which events a belief counts (``readout_at``)."""
        return counted_readouts(batch.hours, batch.present, self.readout_at, self.landmarks)

    def missing_tokens(self) -> Tensor:
        """float[M, H]: the missing tokens through their projectors."""
        state = self.predict.new_zeros(1, self.encoders.state_width)
        tokens = self.encoders.missing_latents(self.reach)
        return torch.cat([self.projectors[m](tokens[i, None], state) for i, m in enumerate(self.encoders.modalities)])

    def _projector(self, modality: str) -> Projector:
        projector = self.projectors[modality]
        assert isinstance(projector, Projector)
        return projector

    def forward(self, batch: TrajectoryBatch, packed: bool = False) -> TrajectoryOutput:
        """Read timelines; ``packed`` joins them into rows instead of padding each."""
        inputs = self.inputs(batch)
        events = self.embed(batch, inputs=inputs)
        return self.read(events, self.direct(batch, events, inputs), batch.present, packed)

    def read(self, events: Tensor, direct: Tensor, present: Tensor, packed: bool = False) -> TrajectoryOutput:
        """What :meth:`forward` makes of its events once they are embedded.

        Args:
            events: float[B, S, H], as :meth:`embed` returns them.
            direct: float[B, S, K], as :meth:`direct` returns them.
            present: bool[B, S], False at padding.
            packed: as in :meth:`forward`.
        """
        sequence, positions = interleave(events, self.predict)
        sequence, positions = self.behind_prompt(sequence), positions + len(self.prompt_ids)
        mask = nn.functional.pad(present.repeat_interleave(2, dim=1), (len(self.prompt_ids), 0), value=True)
        with torch.autocast(sequence.device.type, dtype=torch.bfloat16, enabled=self.bf16 and self.training):
            states, _ = self.sequence_reader(self.backbone, sequence, mask, None, False, packed)
        hidden = states[:, positions].float()
        return TrajectoryOutput(sequence, hidden, self.readouts_of(hidden) + direct, positions)

    def readouts_of(self, hidden: Tensor) -> Tensor:
        """float[B, S, K]: what read-outs take from states at [PREDICT]s float[B, S, H]."""
        return self._share * self._said(self.heads, hidden)

    def _said(self, heads: nn.ModuleDict, states: Tensor) -> Tensor:
        """float[B, S, K] of float[B, S, H]; zero where there are no heads."""
        if not heads:
            return states.new_zeros(*states.shape[:-1], len(self.targets))
        return torch.cat([heads[target](states) for target in self.targets], dim=-1)

    @property
    def _share(self) -> Tensor:
        """float[K]: what the network counts; it learns alone, so that what stands beside leaves it something."""
        return torch.ones_like(self.shares[0]) if self.training else self.shares[0]

    def direct(self, batch: TrajectoryBatch, events: Tensor, inputs: list[Tensor] | None = None) -> Tensor:
        """float[B, S, K]: what read-outs take from events past the backbone; zero where they take nothing.

        Args:
            batch: the events.
            events: float[B, S, H], as :meth:`embed` returns them.
            inputs: :meth:`inputs`, where they are at hand.
        """
        found = self._share * self._said(self.event_heads, events)
        if not self.training:
            for share, said in zip(self.shares[1:], self._beside(batch, inputs), strict=True):
                found = found + share * said
        return found

    def _beside(self, batch: TrajectoryBatch, inputs: list[Tensor] | None = None) -> list[Tensor]:
        """Read-outs float[B, S, K] of what stands beside the network, in order of ``components``."""
        found = []
        for readout in self.beside.values():
            if isinstance(readout, LinearReadout):
                found.append(readout(self.inputs(batch) if inputs is None else inputs, batch))
            else:
                found.append(readout(batch))
        return found

    @property
    def beside(self) -> dict[str, LinearReadout | TreeReadout]:
        """What stands beside the network, by the setting that asks for it."""
        asked = {"linear_readout": self.linear, "tree_readout": self.trees}
        return {name: readout for name, readout in asked.items() if readout is not None}

    @property
    def components(self) -> list[str]:
        """P names of what read-outs are averaged of, the network first."""
        return ["network", *self.beside]

    @torch.no_grad()
    def apart(self, batch: TrajectoryBatch) -> Tensor:
        """float[B, S, P, K]: the read-outs of every component alone, outside training."""
        inputs = self.inputs(batch)
        events = self.embed(batch, inputs=inputs)
        hidden = self.read(events, torch.zeros_like(batch.hours)[..., None], batch.present).hidden
        return torch.stack([self.alone(events, hidden), *self._beside(batch, inputs)], dim=2)

    def alone(self, events: Tensor, hidden: Tensor) -> Tensor:
        """float[B, S, K]: the network's read-outs, from embedded events and states at [PREDICT]s, float[B, S, H]."""
        return self._said(self.heads, hidden) + self._said(self.event_heads, events)

    def inputs(self, batch: TrajectoryBatch) -> list[Tensor]:
        """float[N, I] of each modality: what its projector reads of its N events, in order of the batch."""
        found = []
        for index, name in enumerate(self.encoders.modalities):
            chosen = (batch.modality == index) & batch.present
            found.append(self._projector(name).inputs(batch.latents[chosen], batch.state[chosen]))
        return found

    def beliefs_of(self, readouts: Tensor) -> dict[str, Tensor]:
        """Beliefs float[...] by target from read-outs float[..., K]."""
        return {task.target: task.belief(readouts[..., k]) for k, task in enumerate(self.fitted_tasks)}

    def encode_timeline(self, timeline: Timeline) -> TrajectoryBatch:
        """A timeline as a batch of one (:meth:`trajlm.timelines.TimelineReader.batch`)."""
        return self.timelines.batch(timeline, self.fitted_tasks, self.max_events)

    @torch.no_grad()
    def beliefs(self, timeline: Timeline) -> pl.DataFrame:
        """The belief after every event of a stay that is read, whether or not it counts (``readout_at``).

        Returns:
            one row per event: stay_id, split, event_index, hours_since_admission, modality, and for every target
            ``belief_<target>`` (probability, or hours) and ``target_<target>`` (null where unknown).
        """
        was_training = self.training
        self.eval()
        batch = self.encode_timeline(timeline)
        frame = self.belief_frame(batch, self(batch).readouts)
        self.train(was_training)
        return frame.with_columns(pl.lit(timeline.split).alias("split"))

    def belief_frame(self, batch: TrajectoryBatch, readouts: Tensor, counted: bool = False) -> pl.DataFrame:
        """Beliefs of a batch as a table, in the columns of ``beliefs.parquet`` (``split`` null).

        With ``counted`` those alone that count (``readout_at``).
        """
        chosen = self.counted(batch) if counted else batch.present
        return batch_beliefs(batch, chosen, self.encoders.modalities, self.fitted_tasks, readouts)

    def stream(self, saved: Path | str | None = None) -> BeliefStream:
        """Beliefs of one stay as its events arrive; ``saved`` goes on from a folder that a stream saved."""
        from trajlm.streaming import BeliefStream

        return BeliefStream(self) if saved is None else BeliefStream.load(self, saved)

    def streams(self, saved: Path | str | None = None) -> BeliefStreams:
        """Beliefs of many stays as their events arrive, all stays of a push through the backbone together."""
        from trajlm.streaming import BeliefStreams

        return BeliefStreams(self) if saved is None else BeliefStreams.load(self, saved)

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write one folder that ``from_pretrained`` loads: weights, settings, card and figures; see ``trajlm.hub``."""
        from trajlm.hub import save_model

        return save_model(self, folder)

    def push_to_hub(self, repository: str, private: bool = True, token: str | None = None) -> str:
        """Upload that folder to ``owner/name`` of the Hugging Face hub; returns the address of the commit."""
        from trajlm.hub import push_model

        return push_model(self, repository, private, token)

    @classmethod
    def from_pretrained(cls, run: Path | str) -> TrajectoryModel:
        """A fine-tuned model from its run folder, or from a hub repository that holds one (safetensors only)."""
        from trajlm.assemble import load_trajectory_model

        return load_trajectory_model(run)


def _head(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, 1))
