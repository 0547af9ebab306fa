"""Notes through any Hugging Face text encoder, by name: frozen, with low-rank adapters, or trained whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Encoder, Encoding, mlp_head
from trajlm.encoders.tower import Tower
from trajlm.errors import TrajlmError
from trajlm.views import TextView
from trajlm.weights import locate

# Names for recipes; any other hub id or local folder does as well. minilm-l6 also comes as a package (trajlm fetch).
PRESETS = {
    "minilm-l6": "minilm-l6",
    "clinicalbert": "emilyalsentzer/Bio_ClinicalBERT",
    "biobert": "dmis-lab/biobert-base-cased-v1.2",
    "biomedbert": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext",
    "clinical-longformer": "yikuan8/Clinical-Longformer",
    "bioclinical-modernbert": "thomas-sounack/BioClinical-ModernBERT-base",
}
ROWS = 32  # windows of notes that pass through the encoder at once
# Families whose positions are counted from after the padding token's.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")


def windows(pieces: Sequence[int], room: int, long_notes: str, most: int) -> list[list[int]]:
    """The word pieces of a note as windows of at most ``room``, at least one.

    Args:
        pieces: of the whole note.
        room: most pieces of a window.
        long_notes: of a longer note, head keeps the first ``room``; head_and_tail the first quarter of the room and
            the end of the note; chunks cuts it into windows.
        most: chunks that are kept, from the first.
    """
    if len(pieces) <= room or long_notes == "head":
        return [list(pieces[:room])]
    if long_notes == "head_and_tail":
        head = room // 4
        return [[*pieces[:head], *pieces[len(pieces) - (room - head) :]]]
    return [list(pieces[start : start + room]) for start in range(0, len(pieces), room)][:most]


class TextTower(Encoder):
    """Mean of the last layer's word pieces, over all windows of a note, through a trainable MLP.

    A frozen encoder reads each distinct note once per process. Tokens are the word pieces, special ones included; the
    levels are the mean after every layer.

    Args:
        name: a key of PRESETS, a hub id or a local folder.
        config: settings of the encoders.
        tuning: frozen, lora or full.
    """

    def __init__(self, name: str, config: EncoderConfig, tuning: str) -> None:
        super().__init__()
        model, self._tokenizer = _load(name)
        settings = model.config
        self.tower = Tower(name, model, tuning, config)
        self.head = mlp_head(settings.hidden_size, config)
        self.level_widths = (settings.hidden_size,) * settings.num_hidden_layers
        self._front, self._back = _special_pieces(self._tokenizer)
        self._room = min(config.max_tokens, _most_positions(settings, self._tokenizer))
        self._room -= len(self._front) + len(self._back)
        self._long_notes, self._most = config.long_notes, config.max_chunks
        self._pooled: dict[bytes, Tensor] = {}

    def encode(self, view: TextView, *, tokens: bool = False, levels: bool = False) -> Encoding:
        """See :class:`Encoder`."""
        if self.tower.frozen and not tokens and not levels:
            return Encoding(self.head(self._remembered(view.texts)))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.tower.frozen):
            rows = self._rows(view.texts)
            hidden, present, found = self._hidden(rows, len(view), levels)
        pooled = _over_notes(hidden, present, rows, len(view))
        shown: tuple[Tensor | None, Tensor | None] = (None, None)
        if tokens:
            pieces, there = _side_by_side(hidden, present, rows, len(view))
            shown = (self.head(pieces), there)
        return Encoding(self.head(pooled), *shown, tuple(found) if levels else None)

    def _remembered(self, texts: Sequence[str]) -> Tensor:
        """float[N, W] of a frozen encoder, which need not read a note twice."""
        device = self.tower.digest.device
        new = sorted({t for t in texts if _key(t) not in self._pooled}, key=len)
        for start in range(0, len(new), ROWS):
            chunk = new[start : start + ROWS]
            with torch.no_grad():
                rows = self._rows(chunk)
                hidden, present, _ = self._hidden(rows, len(chunk), levels=False)
                pooled = _over_notes(hidden, present, rows, len(chunk)).cpu()
            self._pooled |= {_key(text): vector for text, vector in zip(chunk, pooled, strict=True)}
        return torch.stack([self._pooled[_key(text)] for text in texts]).to(device)

    def _rows(self, texts: Sequence[str]) -> list[tuple[int, list[int]]]:
        """Windows of all notes, special pieces included, each with the place of its note."""
        cut = self._tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False)
        return [
            (note, [*self._front, *window, *self._back])
            for note, pieces in enumerate(cut["input_ids"])
            for window in windows(pieces, self._room, self._long_notes, self._most)
        ]

    def _hidden(
        self, rows: list[tuple[int, list[int]]], notes: int, levels: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """float[R, S, W] last layer of R windows, bool[R, S] present, and the levels of the notes."""
        longest = max(len(ids) for _, ids in rows)
        device = next(self.head.parameters()).device
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [padding] * (longest - len(row)) for _, row in rows], device=device)
        present = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for _, row in rows], device=device)
        last, found = [], []
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            kept = present[part].any(dim=0)  # no longer than this part needs
            output = self.tower.model(
                input_ids=ids[part, kept], attention_mask=present[part, kept].long(), output_hidden_states=levels
            )
            last.append(_widened(output.last_hidden_state, longest))
            if levels:
                found.append([_widened(layer, longest) for layer in output.hidden_states[1:]])
        pooled = [_over_notes(torch.cat(layer), present, rows, notes) for layer in zip(*found, strict=True)]
        return torch.cat(last), present, pooled


def _widened(hidden: Tensor, length: int) -> Tensor:
    return nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))


def _over_notes(hidden: Tensor, present: Tensor, rows: list[tuple[int, list[int]]], notes: int) -> Tensor:
    """float[N, W]: mean over the present pieces of all windows of a note."""
    place = torch.tensor([note for note, _ in rows], device=hidden.device)
    kept = hidden.masked_fill(~present[..., None], 0.0).sum(dim=1)
    total = hidden.new_zeros(notes, hidden.shape[-1]).index_add(0, place, kept)
    count = hidden.new_zeros(notes).index_add(0, place, present.sum(dim=1).to(hidden.dtype))
    return total / count[:, None]


def _side_by_side(
    hidden: Tensor, present: Tensor, rows: list[tuple[int, list[int]]], notes: int
) -> tuple[Tensor, Tensor]:
    """float[N, S, W] and bool[N, S]: the windows of each note one after another."""
    of_note = [[i for i, (note, _) in enumerate(rows) if note == wanted] for wanted in range(notes)]
    pieces = [torch.cat([hidden[i][present[i]] for i in windows_of]) for windows_of in of_note]
    padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    lengths = torch.tensor([len(p) for p in pieces], device=hidden.device)
    return padded, torch.arange(padded.shape[1], device=hidden.device) < lengths[:, None]


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    source = locate(PRESETS.get(name, name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise TrajlmError(f"text encoder {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # reads one position; we pool all, and what is never read would never be trained
    return model.eval(), tokenizer


def _special_pieces(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _most_positions(settings: Any, tokenizer: Any) -> int:
    positions = int(getattr(settings, "max_position_embeddings", None) or tokenizer.model_max_length)
    if settings.model_type in _OFFSET_POSITIONS:
        positions -= int(settings.pad_token_id) + 1
    return positions


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
