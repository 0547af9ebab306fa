"""What a pretraining run tells of its latent space, against plain computations, and the page that shows it."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from conftest import RECIPE, command
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, Elements

from trajlm.alignment import masked_global_alignment_loss
from trajlm.assemble import load_encoders
from trajlm.pretraining import LOSS_BATCH, encode_stays, movement_when_masked
from trajlm.report.alignment import alignment_report
from trajlm.report.svg import curves, scatter
from trajlm.retrieval import alignment, recall_at_k, uniformity
from trajlm.schema import HELD_OUT, TUNING


@st.composite
def spaces(draw):
    stays, modalities = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    latents = random.normal(size=(stays, modalities, 3)) * 5
    present = random.random((stays, modalities)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return latents, present, [f"m{i}" for i in range(modalities)]


def unit(vector):
    return vector / np.linalg.norm(vector)


@settings(max_examples=60, deadline=None)
@given(spaces())
def test_alignment_and_uniformity_equal_plain_loops(space):
    latents, present, names = space
    pairs = {}
    for one, other in combinations(range(len(names)), 2):
        both = [i for i in range(len(latents)) if present[i, one] and present[i, other]]
        if both:
            squared = [sum((unit(latents[i, one]) - unit(latents[i, other])) ** 2) for i in both]
            pairs[f"{names[one]}, {names[other]}"] = sum(squared) / len(squared)
    found = alignment(latents, present, names)
    assert found.pop("mean", None) == (pytest.approx(np.mean(list(pairs.values()))) if pairs else None)
    assert found == pytest.approx(pairs)

    spread = {}
    for m, name in enumerate(names):
        held = [unit(latents[i, m]) for i in range(len(latents)) if present[i, m]]
        if len(held) > 1:
            kernel = [math.exp(-2 * sum((a - b) ** 2)) for a, b in combinations(held, 2)]
            spread[name] = math.log(sum(kernel) / len(kernel))
    found = uniformity(latents, present, names)
    assert found.pop("mean", None) == (pytest.approx(np.mean(list(spread.values()))) if spread else None)
    assert found == pytest.approx(spread)


@settings(max_examples=40, deadline=None)
@given(spaces())
def test_recall_counts_queries_whose_own_stay_is_near(space):
    latents, present, names = space
    rows = {(r["query"], r["gallery"], r["k"]): r for r in recall_at_k(latents, present, names, (1, 3)).to_dicts()}
    seen = set()
    for q, g in permutations(range(len(names)), 2):
        both = [i for i in range(len(latents)) if present[i, q] and present[i, g]]
        for k in (1, 3) if both else ():
            hits = 0
            for i in both:
                near = sorted(both, key=lambda j: -float(unit(latents[i, q]) @ unit(latents[j, g])))
                hits += i in near[:k]
            row = rows[names[q], names[g], k]
            assert row["recall"] == pytest.approx(hits / len(both))
            assert row["random"] == pytest.approx(min(1, k / len(both)))
            assert row["stays"] == len(both)
            seen.add((names[q], names[g], k))
    assert seen == set(rows)


def test_a_stay_moves_by_what_a_modality_alone_knew():
    latents = np.zeros((3, 2, 2), dtype=np.float32)
    latents[:, 0, 0] = latents[:, 1, 1] = 1.0  # orthogonal: the representation lies half way between
    present = np.array([[True, True], [True, True], [True, False]])
    moved = movement_when_masked(latents, present, ("a", "b"))
    assert moved == pytest.approx({"a": 1 - math.sqrt(0.5), "b": 1 - math.sqrt(0.5)})
    latents[:, 1] = latents[:, 0] * 7
    assert movement_when_masked(latents, present, ("a", "b")) == pytest.approx({"a": 0, "b": 0}, abs=1e-6)


def test_one_point_is_aligned_and_not_uniform():
    latents = np.ones((6, 3, 4))
    held = np.ones((6, 3), dtype=bool)
    names = ["a", "b", "c"]
    assert alignment(latents, held, names)["mean"] == pytest.approx(0, abs=1e-12)
    assert uniformity(latents, held, names)["mean"] == pytest.approx(0, abs=1e-12)
    latents[:, 1] *= -1
    assert alignment(latents, held, names)["a, b"] == pytest.approx(4)
    spread = np.random.default_rng(0).normal(size=(500, 1, 50))
    assert uniformity(spread, np.ones((500, 1), dtype=bool), ["a"])["a"] == pytest.approx(-4, abs=0.2)


@pytest.fixture(scope="module")
def measured(encoders_run) -> dict:
    return json.loads((encoders_run / "metrics.json").read_text())


def test_the_loss_told_is_that_of_the_saved_encoders(measured, encoders_run, prepared):
    encoders, _ = load_encoders(encoders_run, prepared)
    for split in (TUNING, HELD_OUT):
        latents, present = encode_stays(prepared, encoders.eval(), prepared.positions(split))
        assert len(latents) <= LOSS_BATCH  # one batch
        loss = masked_global_alignment_loss(
            torch.from_numpy(latents), torch.from_numpy(present), torch.tensor(measured["temperature"])
        )
        assert measured["splits"][split]["loss"] == pytest.approx(float(loss), rel=1e-5)
        found = measured["splits"][split]
        assert {"recall_by_pair", "silhouette", "alignment", "uniformity", "movement_when_masked"} <= set(found)
        assert found["uniformity"] == pytest.approx(uniformity(latents, present, encoders.modalities))


def test_pretraining_leaves_a_page_and_says_what_it_measured(measured, encoders_run, prepared, tmp_path):
    page = (encoders_run / "alignment.html").read_text()
    picture = (encoders_run / "latents.svg").read_text()
    found = Elements(page)
    assert not found.named("script")
    assert "default-src 'none'" in page
    assert not re.search("https?:", re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", page))
    held = prepared.present(prepared.positions(HELD_OUT), load_encoders(encoders_run, prepared)[0].modalities)
    assert picture.count("<use") == int(held.sum()) + held.shape[1]  # a mark per latent, and the legend's
    overall = measured["splits"][HELD_OUT]["silhouette"]["overall"]
    assert f"{overall:.3f}".replace("-", "−") in page

    copy = tmp_path / "run"
    shutil.copytree(encoders_run, copy)
    (copy / "alignment.html").unlink()
    said = alignment_report(copy, prepared.folder)
    assert f"silhouette {overall:.3f}".replace("-", "−") in said
    assert (copy / "alignment.html").read_text() == page
    assert (copy / "latents.svg").read_text() == picture
    done = command("pretrain.py", *RECIPE, "--pretraining.batch_size", 48, "--pretraining.epochs", 3,
                   "--data", prepared.folder, "--out", encoders_run)  # fmt: skip
    assert said.splitlines()[0] in done.stdout


def test_names_from_records_stay_text():
    points, labels = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2
    for drawn in (scatter(points, labels, [HOSTILE, "b"]), curves({HOSTILE: [(1, 2.0), (2, 1.0)]}, HOSTILE, "y")):
        assert {name for name, _, _ in Elements(drawn).found} <= {
            "svg",
            "title",
            "defs",
            "path",
            "use",
            "text",
            "polyline",
        }


def test_marks_keep_their_distances_and_stay_inside():
    points, labels = np.random.default_rng(0).normal(size=(40, 2)) * [3, 0.5], np.arange(40) % 3
    drawn = scatter(points, labels, ["a", "b", "c"])
    marks = [attrs for attrs, _ in Elements(drawn).named("use")][3:]
    placed = np.array([[float(m["x"]), float(m["y"])] for m in marks])
    assert [m["href"] for m in marks] == [f"#mark{label}" for label in labels]
    ratio = np.linalg.norm(placed[1:] - placed[0], axis=1) / np.linalg.norm(points[1:] - points[0], axis=1)
    assert np.allclose(ratio, ratio.mean(), rtol=0.05)
    assert (placed > 0).all()
    assert (placed < [760, 520]).all()
