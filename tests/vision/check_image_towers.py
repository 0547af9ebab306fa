"""Image models of open_clip and timm, for real. Run by test_image_towers.py in an environment that has both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from encoder_example import CONFIG, build
from safetensors.torch import load, save, save_file
from torch.nn import functional as F

from trajlm.dataset import StayBatch
from trajlm.encoders import image_tower
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.errors import TrajlmError
from trajlm.schema import Modality
from trajlm.views import ImageView

# Architectures of the libraries' own code, made small enough for two cores.
TINY_RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
}
TINY_TRANSFORMER = {
    **TINY_RESNET,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
}
TINY_TIMM = {
    **TINY_RESNET,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
}
NAMES = [
    "open_clip:tiny-resnet",
    "open_clip:tiny-transformer",
    "open_clip:tiny-timm",
    "timm:test_resnet",
    "timm:test_vit",
]


@pytest.fixture(scope="session", autouse=True)
def tiny_models(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    for name, config in (("resnet", TINY_RESNET), ("transformer", TINY_TRANSFORMER), ("timm", TINY_TIMM)):
        (folder / f"tiny-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture
def view() -> ImageView:
    random = np.random.default_rng(0)
    return ImageView(torch.from_numpy(random.integers(0, 256, (3, 48, 48), dtype=np.uint8)))


def saved_weights(name: str, folder: Path) -> tuple[str, torch.nn.Module]:
    """A name with a file of weights, as the library would publish them, and the library's own model that holds them."""
    torch.manual_seed(7)
    library, model = name.split(":")
    made = open_clip.create_model(model) if library == "open_clip" else timm.create_model(model)
    save_file({n: t.contiguous() for n, t in made.state_dict().items()}, folder / "weights.safetensors")
    return f"{name}:{folder / 'weights.safetensors'}", made.eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_is_the_librarys_own(name, view, tmp_path):
    """Pictures made ready by hand, through the library's model called as its manual says."""
    given, library = saved_weights(name, tmp_path)
    model = build("image", given)
    pixels = view.pixels[:, None].float() / 255
    pixels = F.interpolate(pixels, (model.size, model.size), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    if name.startswith("open_clip"):
        mean, std = library.visual.image_mean, library.visual.image_std
    else:
        mean, std = library.pretrained_cfg["mean"], library.pretrained_cfg["std"]
    ready = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        summary = model.read(view, levels=False).summary
        if name == "open_clip:tiny-transformer":
            torch.testing.assert_close(summary @ library.visual.proj, library.encode_image(ready), rtol=1e-4, atol=1e-5)
        elif name == "open_clip:tiny-resnet":
            maps = library.visual.forward_intermediates(ready)["image_intermediates"][-1]
            torch.testing.assert_close(summary, maps.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
        else:
            trunk = library.visual.trunk if name.startswith("open_clip") else library
            features = trunk.forward_features(ready)
            expected = (
                features.mean(dim=(2, 3)) if features.ndim == 4 else trunk.forward_head(features, pre_logits=True)
            )
            if expected.ndim == 3:
                expected = features[:, trunk.num_prefix_tokens :].mean(dim=1)
            torch.testing.assert_close(summary, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_the_stages_the_library_gives(name, view, tmp_path):
    given, library = saved_weights(name, tmp_path)
    model = build("image", given)
    with torch.no_grad():
        found = model.encode(view, tokens=True, levels=True)
        pixels = F.interpolate(view.pixels[:, None].float() / 255, (model.size,) * 2, mode="bilinear", antialias=True)
        ready = (pixels - model.mean) / model.std
        if name.startswith("open_clip"):
            # Of a residual network the stem comes first, which is no stage.
            maps = library.visual.forward_intermediates(ready)["image_intermediates"][-len(model.level_widths) :]
        else:
            maps = library.forward_intermediates(ready, intermediates_only=True, norm=False)
    assert len(found.levels) == len(maps) == len(model.level_widths)
    assert [tuple(level.shape) for level in found.levels] == [(3, width) for width in model.level_widths]
    # A transformer's stage also holds the class position, which its map leaves out.
    if "resnet" in name:
        for level, stage in zip(found.levels, maps, strict=True):
            torch.testing.assert_close(level, stage.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    assert found.tokens.shape[1] == maps[-1].shape[2] * maps[-1].shape[3]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_alone_together_saved_and_trained(name, tuning, view, tmp_path):
    given, _ = saved_weights(name, tmp_path)
    one, other = (build("image", given, seed=seed, tuning=tuning) for seed in (0, 1))
    with torch.no_grad():
        latents = one(view)
        alone = torch.cat([one(view.select(torch.tensor([i]))) for i in range(3)])
        torch.testing.assert_close(alone, latents, rtol=1e-4, atol=1e-5)
        other.load_state_dict(load(save({n: t.contiguous() for n, t in one.state_dict().items()})))
        assert torch.equal(other(view), latents)
    assert any(n.startswith("tower.trained.") for n in one.state_dict()) == (tuning == "full")
    one.train()
    (one(view) * torch.randn(3, CONFIG.latent_width)).sum().backward()
    for parameter_name, parameter in one.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    assert one.tower.model.training == (tuning == "full")


def test_a_published_architecture_encodes():
    """RN50 as it stands in the table of open_clip, at its own size."""
    pixels = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8)
    model = build("image", "open_clip:RN50:random")
    assert (model.size, model.level_widths) == (224, (256, 512, 1024, 2048))
    with torch.no_grad():
        found = model.encode(ImageView(pixels), tokens=True, levels=True)
    assert found.latent.isfinite().all()
    assert found.tokens.shape == (2, 49, CONFIG.latent_width)


def test_a_run_with_an_image_tower_keeps_other_modalities_apart(view):
    torch.manual_seed(0)
    config = CONFIG.__class__(latent_width=6, hidden_width=16, by_modality={"xray": "timm:test_resnet:random"})
    model = AlignedEncoders([Modality("xray", "image"), Modality("note", "text")], [], config).eval()
    present = torch.tensor([[True, False]] * 3)
    with torch.no_grad():
        latents = model(StayBatch(torch.arange(3), present, model.modalities, {"xray": view}))
    assert torch.equal(latents[:, 1], model.missing_tokens[1].expand(3, -1))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("open_clip:RN50", "one of random, openai"),
        ("open_clip:RN51:random", "could not be built"),
        ("timm:resnet1234:random", "could not be built"),
        ("timm:test_resnet:/none/weights.safetensors", "expected a safetensors file"),
        ("open_clip:RN50:/none/weights.pt", "expected a safetensors file"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(name, said):
    with pytest.raises(TrajlmError, match=said):
        build("image", name)


def test_published_weights_are_asked_for_as_safetensors_alone(monkeypatch):
    asked: list[tuple[str, str]] = []

    def refuse(repository: str, file: str) -> str:
        asked.append((repository.rstrip("/"), file))
        raise OSError("no hub here")

    monkeypatch.setattr(image_tower, "_from_hub", refuse)
    for name in ("open_clip:RN50:openai", "timm:resnet18.a1_in1k"):
        with pytest.raises(TrajlmError, match="no hub here"):
            build("image", name)
    assert ("timm/resnet50_clip.openai", "open_clip_model.safetensors") in asked
    assert ("timm/resnet18.a1_in1k", "model.safetensors") in asked
