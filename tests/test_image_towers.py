"""Image models by name. CLIP of transformers runs here; open_clip and timm in an environment of their own.

torchvision, which those two need, breaks transformers where it was built for another torch, so the ordinary
environment does not hold it. `make test-vision` makes the other one and runs its checks alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from encoder_example import CONFIG, build, example_view
from safetensors.torch import load, save
from transformers import CLIPVisionConfig, CLIPVisionModel

from trajlm.encoders.augment import augment, jitter, random_maps, resample
from trajlm.errors import TrajlmError

VISION = Path(__file__).parent / "vision"


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    """A CLIP vision model of random weights that reads 32 x 32 pixels, as transformers saves one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return str(folder)


def vision_python() -> str | None:
    """A Python that has open_clip and timm: TRAJLM_VISION_PYTHON, that of `make test-vision`, or this one."""
    chosen = os.environ.get("TRAJLM_VISION_PYTHON")
    if chosen:
        return chosen
    made = ROOT / ".venv-vision/bin/python"
    if made.exists():
        return str(made)
    here = all(importlib.util.find_spec(name) for name in ("open_clip", "timm", "torchvision"))
    return sys.executable if here else None


def test_open_clip_and_timm_for_real():
    python = vision_python()
    if python is None:
        pytest.skip("no environment with open_clip and timm: run `make test-vision`, or set TRAJLM_VISION_PYTHON")
    path = os.pathsep.join([str(VISION), str(VISION.parent), str(ROOT)])
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", str(VISION / "check_image_towers.py")],
        env=environment(HF_HUB_OFFLINE="1") | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert re.search(r"^.*\d+ passed", done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_a_clip_vision_model_of_transformers(clip, tuning):
    """Against the model called by hand, alone and together, saved and loaded, trained or not."""
    one, other, view = (
        *(build("image", f"clip:{clip}", seed=seed, tuning=tuning) for seed in (0, 1)),
        example_view("image"),
    )
    plain = CLIPVisionModel.from_pretrained(clip).eval()
    pixels = torch.nn.functional.interpolate(view.pixels[:, None].float() / 255, (32, 32), mode="bilinear")
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    with torch.no_grad():
        expected = plain(pixel_values=(pixels - mean) / std, output_hidden_states=True)
        found = one.encode(view, tokens=True, levels=True)
        torch.testing.assert_close(one.read(view, False).summary, expected.pooler_output, rtol=1e-5, atol=1e-5)
        for level, hidden in zip(found.levels, expected.hidden_states[1:], strict=True):
            torch.testing.assert_close(level, hidden.mean(dim=1), rtol=1e-5, atol=1e-5)
        alone = torch.cat([one(view.select(torch.tensor([i]))) for i in range(3)])
        torch.testing.assert_close(alone, found.latent, rtol=1e-5, atol=1e-5)
        assert found.tokens.shape == (3, 4, CONFIG.latent_width)
        other.load_state_dict(load(save({n: t.contiguous() for n, t in one.state_dict().items()})))
        assert torch.equal(other(view), one(view))
    one.train()
    (one(view) * torch.randn(3, CONFIG.latent_width)).sum().backward()
    assert all(p.grad is not None for p in one.parameters())
    assert any(n.startswith("tower.trained.") for n, _ in one.named_parameters()) == (tuning == "full")


@pytest.mark.parametrize(
    ("name", "tuning", "said"),
    [
        ("clip:{}", "lora", "choose frozen or full"),
        ("clip:{}:random", "frozen", "learn nothing"),
        ("clip:{}:openai", None, "expected nothing or 'random'"),
        ("clip:./none", None, "no such folder"),
        ("klip:x", None, "the nearest is 'clip:'"),
        ("resnet50", None, "timm:"),
    ],
)
def test_image_encoders_that_cannot_be_had_are_refused(clip, name, tuning, said):
    with pytest.raises(TrajlmError, match=said):
        build("image", name.format(clip), tuning=tuning)


def test_random_weights_come_from_the_seed_and_are_saved(clip):
    one, again, other = (build("image", f"clip:{clip}:random", seed=seed).state_dict() for seed in (0, 0, 1))
    patches = "tower.trained.model.embeddings.patch_embedding.weight"
    assert torch.equal(one[patches], again[patches])
    assert not torch.equal(one[patches], other[patches])


# Augmentation


def maps(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).view(-1, 2, 3)


def test_resampling_is_what_it_says():
    """A flip, a whole-pixel crop and a quarter turn against the same done by indexing."""
    pixels = torch.rand(1, 1, 8, 8)
    assert torch.allclose(resample(pixels, maps([1.0, 0, 0, 0, 1, 0])), pixels, atol=1e-6)
    assert torch.allclose(resample(pixels, maps([-1.0, 0, 0, 0, 1, 0])), pixels.flip(3), atol=1e-6)
    quarter = resample(pixels, maps([0.0, -1, 0, 1, 0, 0]))
    assert torch.allclose(quarter, pixels.rot90(1, (2, 3)), atol=1e-6) or torch.allclose(
        quarter, pixels.rot90(-1, (2, 3)), atol=1e-6
    )
    # The left upper quarter, seen at twice its size: each new pixel lies a quarter of a pixel beside an old one.
    crop = resample(pixels, maps([0.5, 0, -0.5, 0, 0.5, -0.5]))
    assert torch.allclose(
        crop[0, 0, 1, 1],
        (9 * pixels[0, 0, 0, 0] + 3 * pixels[0, 0, 0, 1] + 3 * pixels[0, 0, 1, 0] + pixels[0, 0, 1, 1]) / 16,
        atol=1e-5,
    )


def test_random_maps_stay_within_their_bounds():
    torch.manual_seed(0)
    found = random_maps(2000, torch.device("cpu"))
    linear, centre = found[:, :, :2], found[:, :, 2]
    share = torch.linalg.det(linear).abs()
    assert 0.79 < share.min() < 0.82
    assert 0.98 < share.max() <= 1.0 + 1e-6
    flipped = (torch.linalg.det(linear) < 0).float().mean()
    assert abs(float(flipped) - 0.5) < 0.05
    turned = torch.rad2deg(torch.atan2(linear[:, 1, 0].abs(), linear[:, 0, 0].abs()))
    assert 9 < turned.max() <= 10 + 1e-4
    assert centre.abs().max() < 0.25


def test_jitter_changes_spread_and_level():
    pixels = 0.4 + 0.2 * torch.rand(2, 1, 8, 8)
    contrast, brightness = torch.tensor([1.2, 1.0]), torch.tensor([1.0, 0.8])
    found = jitter(pixels, contrast, brightness)
    assert torch.allclose(found[0].std() / pixels[0].std(), torch.tensor(1.2), atol=1e-4)
    assert torch.allclose(found[0].mean(), pixels[0].mean(), atol=1e-5)
    assert torch.allclose(found[1].mean(), 0.8 * pixels[1].mean(), atol=1e-5)
    assert torch.allclose(found[1].std(), pixels[1].std(), atol=1e-5)


def test_augmentation_is_seeded_and_happens_in_training_alone(clip):
    pixels = torch.rand(4, 1, 16, 16)
    torch.manual_seed(3)
    one, two = augment(pixels), augment(pixels)
    torch.manual_seed(3)
    again = augment(pixels)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert one.min() >= 0
    assert one.max() <= 1
    view = example_view("image")
    for name in ("cnn", f"clip:{clip}"):
        for wanted in (True, False):
            model = build("image", name, CONFIG.__class__(latent_width=6, hidden_width=16, dropout=0.0, augment=wanted))
            with torch.no_grad():
                assert torch.equal(model(view), model(view))
                model.train()
                assert torch.equal(model(view), model(view)) != wanted
