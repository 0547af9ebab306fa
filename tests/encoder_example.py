"""Tiny inputs and tiny pretrained models for the tests of encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from trajlm.config import EncoderConfig
from trajlm.encoders import build_encoder
from trajlm.encoders.base import Encoder
from trajlm.schema import FittedFeature, Modality
from trajlm.views import ImageView, NumericView, TextView, View, numeric_view

CONFIG = EncoderConfig(latent_width=6, hidden_width=16, max_tokens=12)
FEATURES = 3
MEASURED = [FittedFeature("it", f"lab{i}", feature_id=i, mean=0.3 * i, std=0.5 + i) for i in range(FEATURES)]
WORDS = ("no", "edema", "clear", "lungs", "effusion", "left", "small", "new", "tube", "in", "place", "stable")
NOTES = ["clear lungs", "", "small effusion left , new tube in place " * 4]


def random_view(lengths: list[int], seed: int = 0) -> NumericView:
    """Series of these lengths; values of what was not observed are zero."""
    random = np.random.default_rng(seed)
    observed = [random.random((n, FEATURES)) < 0.6 for n in lengths]
    values = [random.normal(size=o.shape).astype(np.float32) * o for o in observed]
    return numeric_view(values, observed, [np.sort(random.uniform(0, 48, n)) for n in lengths])


def example_view(kind: str) -> View:
    """Three inputs of a kind of modality."""
    if kind == "numeric":
        return random_view([4, 2, 5])
    if kind == "text":
        return TextView(list(NOTES))
    random = np.random.default_rng(0)
    return ImageView(torch.from_numpy(random.integers(0, 256, (3, 16, 16), dtype=np.uint8)))


def tiny_bert(folder: Path) -> Path:
    """A text encoder of random weights that reads 16 pieces, as transformers saves one."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def build(kind: str, name: str, config: EncoderConfig = CONFIG, seed: int = 0, tuning: str | None = None) -> Encoder:
    """An encoder in evaluation mode."""
    torch.manual_seed(seed)
    chosen = replace(config, by_modality={"it": name}, tuning_by_modality={"it": tuning} if tuning else {})
    return build_encoder(Modality("it", kind), MEASURED, chosen).eval()
