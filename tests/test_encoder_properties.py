"""What holds for every encoder: what is absent is never read, alone is as together, saved is as loaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from encoder_example import CONFIG, FEATURES, MEASURED, NOTES, build, example_view, random_view, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from trajlm.config import EncoderConfig
from trajlm.encoders import ENCODERS
from trajlm.encoders.base import Encoder, Encoding
from trajlm.encoders.numeric import InputScale
from trajlm.encoders.triplets import MuFuse, Triplets, triplets_of
from trajlm.errors import TrajlmError
from trajlm.views import STATE_PARTS, NumericView, Standardiser, TextView, signed_log

NUMERIC = [name for name, (kind, _) in ENCODERS.items() if kind == "numeric"]
CARRYING = [name for name in NUMERIC if name != "mufuse"]
SCALES = ["signed_log", "linear", "piecewise"]
# kind, name ("bert" stands for a folder of weights) and how its pretrained weights are tuned
ALL = [(kind, name, None) for name, (kind, _) in ENCODERS.items()]
ALL += [("text", "bert", tuning) for tuning in ("frozen", "lora", "full")]
IDS = ["-".join(filter(None, one[1:])) for one in ALL]


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(params=ALL, ids=IDS)
def make(request, bert):
    """Builds one of all encoders, from a seed."""
    kind, name, tuning = request.param

    def built(seed: int = 0, config: EncoderConfig = CONFIG) -> Encoder:
        return build(kind, bert if name == "bert" else name, config, seed, tuning)

    built.kind, built.name, built.tuning = kind, name, tuning
    return built


def everything(model: Encoder, view) -> Encoding:
    with torch.no_grad():
        return model.encode(view, tokens=True, levels=True)


def tensors(encoding: Encoding) -> list[torch.Tensor]:
    return [encoding.latent, encoding.tokens, encoding.token_present, *encoding.levels]


def all_equal(one: Encoding, other: Encoding) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


# One interface


def test_only_what_is_asked_for_is_given_and_computed(make):
    model, view = make(), example_view(make.kind)
    heads = [model.project] if hasattr(model, "project") else [model.last if hasattr(model, "last") else model.head]
    passes: list[int] = []
    heads[0].register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        plain = model.encode(view)
    assert len(passes) == 1
    assert plain.tokens is None
    assert plain.token_present is None
    assert plain.levels is None
    whole = everything(model, view)
    assert len(passes) == 3
    with torch.no_grad():
        assert torch.equal(model(view), plain.latent)
    torch.testing.assert_close(whole.latent, plain.latent, rtol=1e-5, atol=1e-6)
    assert whole.latent.shape == (len(view), CONFIG.latent_width)
    assert whole.tokens.shape[::2] == whole.latent.shape
    assert not whole.tokens[~whole.token_present].any()
    assert [tuple(level.shape) for level in whole.levels] == [(len(view), width) for width in model.level_widths]


def test_many_at_once_equal_one_at_a_time(make):
    model, view = make(), example_view(make.kind)
    together = everything(model, view)
    for row in range(len(view)):
        alone = everything(model, view.select(torch.tensor([row])))
        for whole, single in zip(tensors(together), tensors(alone), strict=True):
            here = whole[row]
            if here.ndim == 2 or here.dtype == torch.bool:  # tokens: those of this input, without padding
                kept, single = together.token_present[row], single[0][alone.token_present[0]]
                here = here[kept]
            else:
                single = single[0]
            torch.testing.assert_close(here, single, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_trained_weight(make):
    model, view = make(), example_view(make.kind)
    if make.tuning == "lora":
        # Adapters start with a zero factor, which the first step moves; until then the other one gets a zero gradient.
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    (model(view) * torch.randn(len(view), CONFIG.latent_width)).sum().backward()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    for name in names:
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def test_saved_and_loaded_gives_the_same_bits(make):
    one, other, view = make(0), make(1), example_view(make.kind)
    before = everything(one, view)
    assert not torch.equal(before.latent, everything(other, view).latent)
    other.load_state_dict(load(save({name: t.contiguous() for name, t in one.state_dict().items()})))
    assert all_equal(before, everything(other, view))


def test_training_mode_is_left_as_found(make):
    model, view = make(), example_view(make.kind)
    before = everything(model, view)
    model.train()
    model(view)
    assert all_equal(before, everything(model.eval(), view))


# Numbers


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("lengths", [[1], [3, 1, 5]])
def test_what_was_not_observed_is_never_read(name, scale, lengths):
    """Neither the raw value of an unobserved entry, nor the state of a feature never seen, nor anything at padding."""
    model, view = build("numeric", name, replace(CONFIG, values=scale)), random_view(lengths)
    padding = ~view.steps[..., None]
    never = view.state.chunk(STATE_PARTS, dim=-1)[1] == 0
    hidden = torch.cat([never, torch.zeros_like(never), never, torch.ones_like(never)], dim=-1) | padding
    noisy = replace(
        view,
        values=view.values.masked_fill(~view.observed | padding, float("nan")),
        observed=view.observed | padding,
        state=view.state.masked_fill(hidden, float("nan")),
        hours=view.hours.masked_fill(~view.steps, float("nan")),
    )
    assert all_equal(everything(model, view), everything(model, noisy))


@pytest.mark.parametrize("name", NUMERIC)
@settings(deadline=None, max_examples=5)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_padding_never_changes_a_latent(name, lengths, seed):
    model, view = build("numeric", name), random_view(lengths, seed)
    parts = ("values", "observed", "state", "hours", "steps")
    with torch.no_grad():
        together = model(view)
        for row, length in enumerate(lengths):
            alone = NumericView(*(getattr(view, part)[row : row + 1, :length] for part in parts))
            torch.testing.assert_close(model(alone)[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NUMERIC)
def test_an_unobserved_value_is_told_from_an_observed_zero(name, scale):
    model = build("numeric", name, replace(CONFIG, state=False, values=scale))
    view = random_view([1])
    seen = replace(view, values=torch.zeros_like(view.values), observed=torch.ones_like(view.observed))
    fewer = seen.observed.clone()
    fewer[0, 0, 0] = False
    with torch.no_grad():
        assert not torch.allclose(model(seen), model(replace(seen, observed=fewer)))


@pytest.mark.parametrize("name", NUMERIC)
def test_every_observed_value_and_its_time_count(name):
    model, view = build("numeric", name), random_view([3])
    with torch.no_grad():
        before = model(view)
        for step, feature in view.observed[0].nonzero().tolist():
            other = view.values.clone()
            other[0, step, feature] += 0.5
            state = view.state.clone()
            state[0, step:, feature] += 0.5
            assert not torch.equal(model(replace(view, values=other, state=state)), before)
        if name != "mlp":  # whose one row has no inner order
            later = view.hours.clone()
            later[0, 1:] += 1.5
            assert not torch.equal(model(replace(view, hours=later)), before)


@pytest.mark.parametrize("name", CARRYING)
def test_state_is_read_only_where_asked_for(name):
    view = random_view([4, 3])
    other = replace(view, state=view.state + 1)
    for wanted in (True, False):
        model = build("numeric", name, replace(CONFIG, state=wanted))
        with torch.no_grad():
            assert torch.equal(model(view), model(other)) != wanted


def test_mufuse_reads_measurements_alone():
    """Nothing is carried forward, whatever the setting: no imputation."""
    view, model = random_view([4, 3]), build("numeric", "mufuse")
    with torch.no_grad():
        assert torch.equal(model(view), model(replace(view, state=view.state + 1)))


def test_signed_log_is_the_papers_scale():
    raw = np.array([[-3.0, 0.0, 120.0]])
    view_values = torch.from_numpy(Standardiser(MEASURED)(raw, np.arange(FEATURES)[None]))
    scaled = InputScale(MEASURED, "signed_log")(view_values, torch.ones(1, FEATURES, dtype=torch.bool))
    np.testing.assert_allclose(scaled, np.sign(raw) * np.log1p(np.abs(raw)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled, signed_log(raw), rtol=1e-5, atol=1e-6)
    category = replace(MEASURED[2], kind="category")
    ones = torch.ones(1, 1)
    assert InputScale([category], "signed_log")(ones, ones.bool()) == 1


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_recurrent_weights_start_orthogonal_and_input_weights_xavier(name):
    width = 32
    model = build("numeric", name, EncoderConfig(latent_width=6, hidden_width=width, layers=2))
    gates = {"lstm": 4, "gru": 3}[name]
    for layer in model.layers:
        assert layer.weight_hh_l0.shape == (gates * width, width)
        for gate in layer.weight_hh_l0.chunk(gates):
            torch.testing.assert_close(gate @ gate.T, torch.eye(width), rtol=0, atol=1e-5)
        fan_out, fan_in = layer.weight_ih_l0.shape
        bound = (6 / (fan_in + fan_out)) ** 0.5
        largest = float(layer.weight_ih_l0.detach().abs().max())
        assert 0.95 * bound < largest <= bound
        assert float(layer.weight_ih_l0.detach().var()) == pytest.approx(bound**2 / 3, rel=0.1)
        assert not layer.bias_hh_l0.any()


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_last_token_of_a_recurrent_encoder_is_its_latent(name):
    view = random_view([4, 2, 5])
    found = everything(build("numeric", name, replace(CONFIG, layers=2)), view)
    last = view.steps.sum(dim=1) - 1
    torch.testing.assert_close(found.tokens[torch.arange(3), last], found.latent, rtol=1e-5, atol=1e-6)
    assert len(found.levels) == 2


@pytest.mark.parametrize("state", [True, False])
def test_a_token_of_the_mlp_is_the_latent_of_its_feature_alone(state):
    model, view = build("numeric", "mlp", replace(CONFIG, state=state)), random_view([4, 2, 5])
    found = everything(model, view)
    for feature in range(FEATURES):
        only = torch.zeros(FEATURES, dtype=torch.bool)
        only[feature] = True
        alone = replace(view, observed=view.observed & only, state=view.state * only.repeat(STATE_PARTS))
        with torch.no_grad():
            latent = model(alone)
        known = found.token_present[:, feature]
        assert torch.equal(known, view.observed[..., feature].any(dim=1))
        torch.testing.assert_close(found.tokens[known, feature], latent[known], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "levels"), [("lstm", 1), ("gru", 1), ("tcn", 3), ("transformer", 2), ("mufuse", 2)])
def test_layers_are_as_many_as_asked_for(name, levels):
    assert len(build("numeric", name).level_widths) == levels
    assert len(build("numeric", name, replace(CONFIG, layers=4)).level_widths) == 4


# MuFuse


def shuffled(triplets: Triplets, seed: int) -> Triplets:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(triplets.feature.shape[1]))
    return Triplets(*(getattr(triplets, n)[:, order] for n in ("feature", "value", "hours", "present")))


def test_triplets_are_exactly_what_was_observed():
    view, scale = random_view([4, 1, 5], seed=3), InputScale(MEASURED, "linear")
    triplets = triplets_of(view, scale)
    for row in range(len(view)):
        expected = [
            (feature, float(view.values[row, step, feature]), float(view.hours[row, step]))
            for step in range(view.values.shape[1])
            for feature in range(FEATURES)
            if view.observed[row, step, feature]
        ]
        kept = triplets.present[row]
        found = zip(*(getattr(triplets, n)[row][kept].tolist() for n in ("feature", "value", "hours")), strict=True)
        assert list(found) == expected


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 999))
def test_the_order_of_triplets_does_not_matter(seed):
    model, view = build("numeric", "mufuse"), random_view([4, 2, 5], seed)
    triplets = triplets_of(view, model.scale)
    with torch.no_grad():
        summary = model.read_triplets(triplets).summary
        assert torch.equal(model.project(summary), model(view))
        torch.testing.assert_close(model.read_triplets(shuffled(triplets, seed)).summary, summary, rtol=1e-5, atol=1e-5)


def gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def layer_norm(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    scaled = (x - x.mean()) / np.sqrt(x.var() + norm.eps)
    return scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def linear(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    return layer.weight.detach().numpy().astype(np.float64) @ x + layer.bias.detach().numpy()


def triplet_embedding(embed: MuFuse, feature: int, value: float, hours: float, width: int, k: int) -> np.ndarray:
    """One measurement, in plain float64."""
    phi = linear(gelu(linear(np.array([value]), embed.phi[0])), embed.phi[2])
    e_v = embed.gamma.detach().numpy()[feature] * phi + embed.beta.detach().numpy()[feature]
    e_f = embed.feature.detach().numpy()[feature].astype(np.float64)
    if embed.fusion == "concatenate":
        e = linear(np.concatenate([e_f, e_v]), embed.both)
    else:
        repeated = np.array([e_v[i % (width // k)] for i in range(width)])
        e = e_f * repeated if embed.fusion == "multiply" else e_f + repeated
    waves = width // 2
    periods = [0.5 * (1000 / 0.5) ** (i / (waves - 1)) for i in range(waves)]
    time = np.array([np.sin(2 * np.pi * hours / p) for p in periods] + [np.cos(2 * np.pi * hours / p) for p in periods])
    return e + time if embed.time == "add" else e * time


def attended(layer: torch.nn.TransformerEncoderLayer, rows: list[np.ndarray], heads: int) -> list[np.ndarray]:
    """One layer of pre-norm self-attention and its feed-forward part, position by position."""
    width = len(rows[0])
    size = width // heads
    inner = layer.self_attn
    weights, biases = inner.in_proj_weight.detach().numpy().astype(np.float64), inner.in_proj_bias.detach().numpy()
    mixed = [weights @ layer_norm(row, layer.norm1) + biases for row in rows]
    q, k, v = ([m[part * width : (part + 1) * width] for m in mixed] for part in range(3))
    out = []
    for i, row in enumerate(rows):
        joined = np.zeros(width)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.array([q[i][part] @ k[j][part] / np.sqrt(size) for j in range(len(rows))])
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            joined[part] = sum(shares[j] * v[j][part] for j in range(len(rows)))
        hidden = row + linear(joined, inner.out_proj)
        read = linear(np.maximum(linear(layer_norm(hidden, layer.norm2), layer.linear1), 0), layer.linear2)
        out.append(hidden + read)
    return out


@pytest.mark.parametrize("time", ["add", "multiply"])
@pytest.mark.parametrize("fusion", ["multiply", "add", "concatenate"])
def test_mufuse_is_what_the_paper_writes(fusion, time):
    """Against one measurement at a time, one head at a time, in plain float64."""
    config = replace(CONFIG, values="linear", fusion=fusion, time=time, partition=4, heads=2)
    model, view = build("numeric", "mufuse", config), random_view([3, 2], seed=5)
    with torch.no_grad():
        latents = model(view).numpy()
    for row in range(len(view)):
        rows = [model.body.summary.detach().numpy().astype(np.float64)]
        for step, feature in view.observed[row].nonzero().tolist():
            value, hours = float(view.values[row, step, feature]), float(view.hours[row, step])
            rows.append(triplet_embedding(model.embed, feature, value, hours, config.hidden_width, config.partition))
        for layer in model.body.layers:
            rows = attended(layer, rows, config.heads)
        norm, (_, project, last) = model.project[0], model.project[1]
        expected = layer_norm(linear(layer_norm(rows[0], norm), project), last)
        np.testing.assert_allclose(latents[row], expected, rtol=1e-4, atol=1e-4)


def test_an_input_of_which_nothing_was_observed_has_a_latent():
    view = random_view([2])
    nothing = replace(view, observed=torch.zeros_like(view.observed))
    found = everything(build("numeric", "mufuse"), nothing)
    assert found.latent.isfinite().all()
    assert not found.token_present.any()


@pytest.mark.parametrize(("options", "said"), [({"partition": 3}, "encoder.partition 3"), ({"heads": 5}, "heads 5")])
def test_widths_that_do_not_divide_are_refused(options, said):
    with pytest.raises(TrajlmError, match=said):
        build("numeric", "mufuse", replace(CONFIG, **options))


# Pretrained text


def test_frozen_weights_are_neither_saved_nor_trained(bert):
    model = build("text", bert, tuning="frozen")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(model.state_dict()) == trained | {"tower.digest"}
    assert all(name.startswith("head.") for name in trained)
    model.train()
    assert not model.tower.model.training


def test_adapters_start_as_the_frozen_encoder_and_then_change_it(bert):
    frozen, lora = (build("text", bert, tuning=tuning) for tuning in ("frozen", "lora"))
    lora.head.load_state_dict(frozen.head.state_dict())
    view = TextView(NOTES)
    with torch.no_grad():
        torch.testing.assert_close(lora(view), frozen(view), rtol=1e-5, atol=1e-5)
    assert all("lora_" in name for name in lora.state_dict() if name.startswith("tower.adapters"))
    optimiser = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    base = {n: p.detach().clone() for n, p in lora.tower.model.named_parameters() if "lora_" not in n}
    for _ in range(2):
        lora(view)[:, 0].sum().backward()
        optimiser.step()
    with torch.no_grad():
        assert not torch.allclose(lora(view), frozen(view), atol=1e-2)
    now = dict(lora.tower.model.named_parameters())
    assert all(torch.equal(before, now[name]) for name, before in base.items())


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_other_weights_under_the_same_name_are_refused(tmp_path, tuning):
    folder = tiny_bert(tmp_path / "bert")
    saved = build("text", str(folder), tuning=tuning).state_dict()
    from transformers import BertModel

    changed = BertModel.from_pretrained(folder)
    with torch.no_grad():
        changed.encoder.layer[0].output.dense.bias[0] += 1e-3
    changed.save_pretrained(folder)
    with pytest.raises(TrajlmError, match="are not those that this run was made with"):
        build("text", str(folder), tuning=tuning).load_state_dict(saved)


def test_tuning_what_holds_no_pretrained_weights_is_refused():
    with pytest.raises(TrajlmError, match="holds no pretrained weights"):
        build("text", "hashed-text", tuning="lora")


def test_a_folder_without_weights_is_told_in_one_line(tmp_path):
    with pytest.raises(TrajlmError, match="could not be loaded"):
        build("text", str(tmp_path))
