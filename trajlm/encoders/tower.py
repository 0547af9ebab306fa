"""A pretrained model inside an encoder: frozen, with low-rank adapters, or trained whole."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.errors import TrajlmError


class Tower(nn.Module):
    """Holds a model whose weights are named, not copied, unless they are trained whole.

    Frozen weights, and those below adapters, stand outside of the tree of modules, so they are neither saved nor
    handed to an optimiser; a digest of them is saved instead, and other weights under the same name are refused.

    Args:
        name: of the weights, for errors.
        model: in evaluation mode.
        tuning: frozen, lora (a transformers model alone) or full.
        config: of it ``lora_rank``.
    """

    digest: Tensor

    def __init__(self, name: str, model: nn.Module, tuning: str, config: EncoderConfig) -> None:
        super().__init__()
        self.name, self.frozen = name, tuning == "frozen"
        if tuning == "full":
            self.trained = model
            return
        self.register_buffer("digest", weights_digest(model))
        if tuning == "lora":
            model = _with_adapters(name, model, config)
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            self.adapters = nn.ParameterDict({n.replace(".", "/"): p for n, p in trained.items()})
        else:
            model.requires_grad_(False)
        self._outside = [model]

    @property
    def model(self) -> Any:
        """The model, on the device of this module."""
        if not hasattr(self, "_outside"):
            return self.trained
        return self._outside[0].to(self.digest.device)

    def train(self, mode: bool = True) -> Tower:
        """Training mode for what is trained; a frozen model stays in evaluation mode."""
        super().train(mode)
        if hasattr(self, "_outside"):
            self._outside[0].train(mode and not self.frozen)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}digest")
        if saved is not None and hasattr(self, "digest") and not torch.equal(saved.cpu(), self.digest.cpu()):
            raise TrajlmError(
                f"the weights now found under {self.name!r} are not those that this run was made with; put the same "
                "ones back (the run's config.yaml names them)"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _with_adapters(name: str, model: Any, config: EncoderConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    # all-linear reaches fused projections too, which the usual names miss in silence.
    settings = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
    adapted = get_peft_model(model, settings)
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise TrajlmError(f"encoder {name!r}: LoRA found no linear layer to adapt; choose frozen or full")
    return adapted


def weights_digest(model: nn.Module) -> Tensor:
    """uint8[32]: SHA-256 of every weight, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
