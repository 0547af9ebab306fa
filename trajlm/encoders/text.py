"""Notes as a small bag of hashed words, trained from nothing."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from itertools import pairwise

import torch
from torch import nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Encoder, Encoding, mlp_head
from trajlm.views import TextView

BUCKETS = 2**14
WORD = re.compile(r"[a-z]+|\d+|[.?!]")
MAX_TOKENS = 512


@lru_cache(maxsize=100_000)
def hashed_words(text: str) -> tuple[int, ...]:
    """Buckets of a text's words and word pairs: the same on every machine, in every process."""
    words = WORD.findall(text.lower())[:MAX_TOKENS]
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    digests = (hashlib.blake2b(gram.encode(), digest_size=4).digest() for gram in (*words, *pairs))
    return tuple(int.from_bytes(digest, "big") % BUCKETS for digest in digests) or (0,)


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
        bags = [torch.tensor(hashed_words(text), device=device) for text in view.texts]
        lengths = torch.tensor([len(bag) for bag in bags], device=device)
        pooled = self.words(torch.cat(bags), lengths.cumsum(0) - lengths)
        encoding = Encoding(self.head(pooled), levels=(pooled,) if levels else None)
        if not tokens:
            return encoding
        padded = nn.utils.rnn.pad_sequence(bags, batch_first=True)
        present = torch.arange(padded.shape[1], device=device) < lengths[:, None]
        words = self.head(nn.functional.embedding(padded, self.words.weight))
        return Encoding(encoding.latent, words, present, encoding.levels)
