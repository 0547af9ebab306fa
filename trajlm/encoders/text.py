"""Notes as a small bag of hashed words, trained from nothing."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Encoder, Encoding, mlp_head
from trajlm.views import TextView

BUCKETS = 2**14
WORD = re.compile(r"[a-z]+|\d+|[.?!]")
MAX_TOKENS = 512


@lru_cache(maxsize=2**16)
def _bucket(gram: str) -> int:
    digest = hashlib.blake2b(gram.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % BUCKETS


def hashed_words(text: str) -> tuple[int, ...]:
    """Buckets of a text's words and word pairs: the same on every machine, in every process."""
    words = WORD.findall(text.lower())[:MAX_TOKENS]
    return tuple(_bucket(gram) for gram in (*words, *(f"{a} {b}" for a, b in pairwise(words)))) or (0,)


@lru_cache(maxsize=2**15)
def bag(text: str) -> np.ndarray:
    """int16[K], :func:`hashed_words` of a text, remembered: as Python numbers, notes would fill gigabytes."""
    return np.array(hashed_words(text), dtype=np.int16)


class HashedText(Encoder):
    """Mean embedding of hashed words and word pairs, then an MLP. Needs no pretrained weights.

    Tokens are the words and word pairs; the one level is their mean.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(BUCKETS, config.hidden_width, mode="mean")
        self.head = mlp_head(config.hidden_width, config)
        self.level_widths = (config.hidden_width,)

    def encode(self, view: TextView, *, tokens: bool = False, levels: bool = False) -> Encoding:
        """See :class:`Encoder`."""
        device = self.words.weight.device
        bags = [bag(text) for text in view.texts]
        lengths = torch.tensor([len(kept) for kept in bags], device=device)
        words = torch.from_numpy(np.concatenate(bags)).to(device, torch.int64)
        pooled = self.words(words, lengths.cumsum(0) - lengths)
        encoding = Encoding(self.head(pooled), levels=(pooled,) if levels else None)
        if not tokens:
            return encoding
        padded = nn.utils.rnn.pad_sequence(words.split(lengths.tolist()), batch_first=True)
        present = torch.arange(padded.shape[1], device=device) < lengths[:, None]
        each = self.head(nn.functional.embedding(padded, self.words.weight))
        return Encoding(encoding.latent, each, present, encoding.levels)
