"""Frozen weights in 4 or 16 bits (QLoRA: NF4 with double quantisation), and AdamW with 8-bit moments.

Only matrices are held small. Norms, state-space parameters and adapters stay in float32, and what is computed with a
16-bit matrix takes the precision of its input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trajlm.adapters import READ_BY_KERNELS
from trajlm.errors import TrajlmError


class HalfLinear(nn.Linear):
    """A linear layer whose weight is held in bfloat16 and multiplied in the precision of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """float[..., out] of float[..., in]."""
        if torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


def loading_options(quantisation: str, compute: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained``.

    Args:
        quantisation: none, bf16 or nf4.
        compute: what 4-bit weights are multiplied in.
    """
    if quantisation == "none":
        return {}
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if quantisation == "nf4":
        # What 4-bit weights were made of is what they are unpacked to in the backward pass.
        options["dtype"] = compute
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
            # Fused kernels of state-space layers take these weights as they are.
            llm_int8_skip_modules=sorted(READ_BY_KERNELS),
        )
    return options


@torch.no_grad()
def settle(trunk: nn.Module) -> nn.Module:
    """A trunk loaded with :func:`loading_options`, its small parameters back in float32 and its matrices frozen.

    A 4-bit layer on a CPU with bfloat16 dot products repacks its weight in place when it is evaluated, and what it
    computes for the next training step is wrong in silence: that path is switched off.

    Raises TrajlmError for experts that are held in one tensor.
    """
    for module in list(trunk.modules()):
        if is_four_bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        elif type(module) is nn.Linear:
            _halve(module)
            module.__class__ = HalfLinear
        elif isinstance(module, nn.Embedding):
            _halve(module)
        else:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.ndim > 2 and not isinstance(module, nn.Conv1d):
                    raise TrajlmError(
                        "backbone.quantisation: this backbone holds its experts in one tensor, which neither 4 nor 16 "
                        "bits are offered for here; use none"
                    )
                setattr(module, name, nn.Parameter(parameter.float()))
    return trunk.requires_grad_(False)


def _halve(module: nn.Linear | nn.Embedding) -> None:
    module.weight = nn.Parameter(module.weight.to(torch.bfloat16))


def is_four_bit(module: nn.Module) -> bool:
    """Whether a layer holds its weight in 4 bits; bitsandbytes is not loaded to find out."""
    kind = type(module)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes")


def dequantised(layer: nn.Module) -> Tensor:
    """float32[out, in]: the weight that a 4-bit layer stands for."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).float()


def adamw8bit(groups: Iterable[dict[str, Any]], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW whose moments are held in 8 bits, those of parameters under 4,096 numbers in 32."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, lr=learning_rate, weight_decay=weight_decay)
