"""Notes: a small bag of hashed words trained from nothing, or any frozen Hugging Face text encoder."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.errors import TrajlmError
from trajlm.views import TextView
from trajlm.weights import locate

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


def _head(width: int, config: EncoderConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, config.hidden_width),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden_width, config.latent_width),
        nn.LayerNorm(config.latent_width),
    )


class HashedText(nn.Module):
    """Mean embedding of hashed words and word pairs, then an MLP. Needs no pretrained weights."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(BUCKETS, config.hidden_width, mode="mean")
        self.head = _head(config.hidden_width, config)

    def forward(self, view: TextView) -> Tensor:
        """float[N, D] latents of N notes."""
        bags = [hashed_words(text) for text in view.texts]
        device = self.words.weight.device
        offsets = torch.tensor([0] + [len(bag) for bag in bags[:-1]]).cumsum(0).to(device)
        flat = torch.tensor([bucket for bag in bags for bucket in bag], device=device)
        return self.head(self.words(flat, offsets))


class FrozenText(nn.Module):
    """Mean-pooled last layer of a frozen Hugging Face encoder (first 512 tokens), then a trainable MLP.

    The frozen weights are named, not saved with ours; each distinct note is encoded once per process.
    """

    def __init__(self, name: str, config: EncoderConfig) -> None:
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        source = locate(name)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            encoder = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise TrajlmError(f"text encoder {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
        self._frozen = [encoder.eval().requires_grad_(False)]  # in a list: not a submodule, so never saved or trained
        self._pooled: dict[bytes, Tensor] = {}
        self._limit = min(MAX_TOKENS, encoder.config.max_position_embeddings)
        self.head = _head(encoder.config.hidden_size, config)

    @torch.no_grad()
    def _pool(self, texts: list[str], device: torch.device) -> None:
        encoder = self._frozen[0].to(device)
        for start in range(0, len(texts), 32):
            chunk = texts[start : start + 32]
            tokens = self._tokenizer(chunk, padding=True, truncation=True, max_length=self._limit, return_tensors="pt")
            tokens = tokens.to(device)
            hidden = encoder(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            for text, vector in zip(chunk, pooled.cpu(), strict=True):
                self._pooled[_key(text)] = vector

    def forward(self, view: TextView) -> Tensor:
        """float[N, D] latents of N notes."""
        device = next(self.head.parameters()).device
        new = sorted({t for t in view.texts if _key(t) not in self._pooled}, key=len)
        if new:
            self._pool(new, device)
        return self.head(torch.stack([self._pooled[_key(text)] for text in view.texts]).to(device))


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
