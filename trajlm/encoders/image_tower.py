"""Pictures through a published image model, by name: open_clip towers, timm models, CLIP vision models of transformers.

A name is LIBRARY:MODEL or LIBRARY:MODEL:WEIGHTS, LIBRARY one of open_clip, timm and clip. WEIGHTS is a tag of the
library, a safetensors file, or ``random``.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trajlm.config import EncoderConfig
from trajlm.encoders.augment import picture
from trajlm.encoders.base import Hidden, ProjectedEncoder, mlp_head
from trajlm.encoders.tower import Tower
from trajlm.errors import TrajlmError
from trajlm.views import ImageView
from trajlm.weights import locate

RANDOM = "random"
SCHEMAS = ("hf-hub:", "local-dir:")  # of open_clip


class Trunk(nn.Module, ABC):
    """An image model without its last projection.

    Attributes:
        model: of its library.
        size: side of the pictures it reads, in pixels.
        mean, std: of every colour, by which it expects them normalised.
        width: W of its hidden values.
        stage_widths: width of every stage.
    """

    def __init__(
        self, model: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...], width: int
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.size, self.mean, self.std, self.width = size, mean, std, width
        self.stage_widths: tuple[int, ...] = ()

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """The modules whose outputs are the levels, first to last."""

    @abstractmethod
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """float[N, W] summary and float[N, S, W] places of normalised pictures float[N, 3, P, P]."""


class OpenCLIPTransformer(Trunk):
    """A vision transformer of open_clip; its summary is what it pools, before the projection to the text's space."""

    def __init__(self, visual: Any) -> None:
        super().__init__(
            visual, _side(visual.image_size), visual.image_mean, visual.image_std, visual.ln_post.bias.numel()
        )
        visual.proj, visual.output_tokens = None, True
        self.stage_widths = (self.width,) * len(visual.transformer.resblocks)

    def stages(self) -> list[nn.Module]:
        """See :class:`Trunk`."""
        return list(self.model.transformer.resblocks)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        return self.model(pixels)


class OpenCLIPResNet(Trunk):
    """A residual network of open_clip; its summary is the mean of its last map."""

    def __init__(self, visual: Any) -> None:
        width = visual.attnpool.positional_embedding.shape[1]
        super().__init__(visual, _side(visual.image_size), visual.image_mean, visual.image_std, width)
        visual.attnpool = nn.Identity()
        self.stage_widths = tuple(width // 2**i for i in (3, 2, 1, 0))

    def stages(self) -> list[nn.Module]:
        """See :class:`Trunk`."""
        return [self.model.layer1, self.model.layer2, self.model.layer3, self.model.layer4]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        places = self.model(pixels).flatten(start_dim=2).mT
        return places.mean(dim=1), places


class TimmModel(Trunk):
    """Any model of timm; its summary is what it pools, or the mean of its last map where that has another width."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        super().__init__(model, settings["input_size"][-1], settings["mean"], settings["std"], model.num_features)
        self._named = [(stage["module"], stage["num_chs"]) for stage in model.feature_info]
        self.stage_widths = tuple(width for _, width in self._named)

    def stages(self) -> list[nn.Module]:
        """See :class:`Trunk`."""
        return [self.model.get_submodule(name) for name, _ in self._named]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        features = self.model.forward_features(pixels)
        places = _places(features, self.width)[:, getattr(self.model, "num_prefix_tokens", 0) :]
        summary = self.model.forward_head(features, pre_logits=True)
        return summary if summary.shape[-1] == self.width else places.mean(dim=1), places


class CLIPVision(Trunk):
    """A CLIP vision model of transformers; its summary is the class position."""

    def __init__(self, model: Any) -> None:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        settings = model.config
        super().__init__(
            model, settings.image_size, tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD), settings.hidden_size
        )
        self.stage_widths = (self.width,) * settings.num_hidden_layers

    def stages(self) -> list[nn.Module]:
        """See :class:`Trunk`."""
        return list(self.model.encoder.layers)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Trunk`."""
        output = self.model(pixel_values=pixels)
        return output.pooler_output, self.model.post_layernorm(output.last_hidden_state[:, 1:])


class ImageTower(ProjectedEncoder):
    """A published image model with a trainable MLP on top.

    Stored greyscale pictures are resized to what it reads, given three equal colours and normalised by its own mean and
    deviation. Tokens are its places or patches; the levels are the mean of every stage.

    Args:
        name: as the module says.
        config: settings of the encoders.
        tuning: frozen or full; None is frozen for published weights and full for random ones.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, config: EncoderConfig, tuning: str | None) -> None:
        super().__init__()
        starts_at_random = name.endswith(f":{RANDOM}")
        tuning = tuning or ("full" if starts_at_random else "frozen")
        if tuning == "lora":
            raise TrajlmError(f"image encoder {name!r}: adapters are for text encoders; choose frozen or full")
        if tuning == "frozen" and starts_at_random:
            raise TrajlmError(f"image encoder {name!r}: random weights that stay frozen learn nothing; choose full")
        trunk = build_trunk(name).eval()
        self.tower = Tower(name, trunk, tuning, config)
        self.augment, self.size = config.augment, trunk.size
        self.register_buffer("mean", torch.tensor(trunk.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(trunk.std).view(1, 3, 1, 1), persistent=False)
        self.project = mlp_head(trunk.width, config)
        self.level_widths = trunk.stage_widths

    def read(self, view: ImageView, levels: bool) -> Hidden:
        """See :class:`ProjectedEncoder`."""
        pixels = picture(view, self.training and self.augment)
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        trunk = self.tower.model
        learns = torch.is_grad_enabled() and not self.tower.frozen
        with torch.set_grad_enabled(learns), _outputs(trunk.stages() if levels else []) as found:
            summary, places = trunk((pixels - self.mean) / self.std)
        pooled = [_places(out, width).mean(dim=1) for out, width in zip(found, self.level_widths, strict=False)]
        return Hidden(summary, places, places.new_ones(places.shape[:2], dtype=torch.bool), pooled)


@contextmanager
def _outputs(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what these modules put out while the block runs; without modules nothing is kept."""
    found: list[Tensor] = []

    def keep(module: nn.Module, given: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _places(out: Tensor, width: int) -> Tensor:
    """float[N, S, W] of a map float[N, W, P, Q] or float[N, P, Q, W], or of float[N, S, W] as it is."""
    if out.ndim == 4:
        return out.flatten(start_dim=2).mT if out.shape[1] == width else out.flatten(start_dim=1, end_dim=2)
    return out


def _side(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]


def build_trunk(name: str) -> Trunk:
    """The image model of a name; raises TrajlmError where the library, the model or the weights are not to be had."""
    library, _, model = name.partition(":")
    try:
        return LIBRARIES[library](model)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise TrajlmError(f"image encoder {name!r} could not be built: {str(error).splitlines()[0]}") from error


def vision_library(name: str) -> Any:
    """A library of the vision extra, imported only where an encoder of it is named."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrajlmError(f"image encoders of {name} need an extra: pip install 'trajlm[vision]'") from error
    except RuntimeError as error:  # torchvision that was built for another torch
        raise TrajlmError(
            f"{name} cannot be imported ({str(error).splitlines()[0]}); install a torchvision that was built for this "
            f"torch ({torch.__version__})"
        ) from error


def _split(model: str) -> tuple[str, str]:
    """MODEL and WEIGHTS; schemas of open_clip (hf-hub:, local-dir:) belong to the model."""
    if model.startswith(SCHEMAS):
        return model.removesuffix(f":{RANDOM}"), RANDOM if model.endswith(f":{RANDOM}") else ""
    name, _, weights = model.partition(":")
    return name, weights


def _safetensors_file(weights: str) -> str:
    if not weights.endswith(".safetensors") or not Path(weights).is_file():
        raise TrajlmError(f"image weights {weights!r}: expected a safetensors file; no other format is loaded")
    return weights


def _from_hub(repository: str, file: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository.rstrip("/"), file)


def _open_clip(model: str) -> Trunk:
    library = vision_library("open_clip")
    name, weights = _split(model)
    options: dict[str, Any] = {}
    published = library.get_pretrained_cfg(name, weights) if weights and not name.startswith(SCHEMAS) else None
    if published:
        options = {"force_quick_gelu": bool(published.get("quick_gelu"))}
        options["force_preprocess_cfg"] = {k: published[k] for k in ("mean", "std") if published.get(k)}
    # Weights are loaded by us, so that only safetensors are.
    built = library.create_model(name, load_weights=False, pretrained_text=False, **options)
    if weights != RANDOM:
        library.load_checkpoint(built, _open_clip_weights(library, name, weights, published))
    visual = built.visual
    if hasattr(visual, "trunk"):
        settings = {"input_size": (3, _side(visual.image_size)), "mean": visual.image_mean, "std": visual.image_std}
        return TimmModel(visual.trunk, settings)
    return OpenCLIPResNet(visual) if hasattr(visual, "attnpool") else OpenCLIPTransformer(visual)


def _open_clip_weights(library: Any, name: str, weights: str, published: dict[str, Any] | None) -> str:
    file = "open_clip_model.safetensors"
    if name.startswith("local-dir:"):
        return _safetensors_file(str(Path(name.removeprefix("local-dir:")) / file))
    if name.startswith("hf-hub:"):
        return _from_hub(name.removeprefix("hf-hub:"), file)
    if published and published.get("hf_hub"):
        return _from_hub(published["hf_hub"], file)
    if not weights or "/" not in weights:
        tags = ", ".join([RANDOM, *library.list_pretrained_tags_by_model(name)])
        raise TrajlmError(
            f"open_clip:{name} needs weights after a colon, a safetensors file or one of {tags}; came {weights!r}"
        )
    return _safetensors_file(weights)


def _timm(model: str) -> Trunk:
    library = vision_library("timm")
    name, weights = _split(model)
    options: dict[str, Any] = {"num_classes": 0, "pretrained": weights != RANDOM}
    if weights and weights != RANDOM:
        options["pretrained_cfg_overlay"] = {"file": _safetensors_file(weights)}
    elif not weights:
        published = library.get_pretrained_cfg(name)
        if published is None or not published.hf_hub_id:
            raise TrajlmError(
                f"timm:{name} has no published weights; name a safetensors file or {RANDOM!r} after a colon"
            )
        options["pretrained_cfg_overlay"] = {"file": _from_hub(published.hf_hub_id, "model.safetensors")}
    built = library.create_model(name, **options)
    return TimmModel(built, library.data.resolve_model_data_config(built))


def _clip(model: str) -> Trunk:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    name, weights = _split(model)
    if weights not in ("", RANDOM):
        raise TrajlmError(f"clip:{name}: expected nothing or {RANDOM!r} after the model, came {weights!r}")
    source = locate(name)
    if weights == RANDOM:
        return CLIPVision(CLIPVisionModel(CLIPVisionConfig.from_pretrained(source)))
    loaded: Any = CLIPVisionModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    return CLIPVision(loaded)


# library -> builder from MODEL[:WEIGHTS]
LIBRARIES: dict[str, Callable[[str], Trunk]] = {"open_clip": _open_clip, "timm": _timm, "clip": _clip}
