"""Models whose attention cannot be shown: a report says so and offers the rest."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from conftest import FINETUNING, TRAJLM, command, last_line
from test_edits import toy_timeline
from trajectory_example import toy_batch, toy_model

from trajlm.errors import TrajlmError
from trajlm.interpret.ablation import cohort_ablation
from trajlm.interpret.attention import shown_layer
from trajlm.interpret.importance import event_importance
from trajlm.interpret.interventions import edges_of_events, knock_out, patched


@pytest.fixture(scope="module")
def without(workplace, prepared_folder, encoders_run):
    """A finished run of a state-space backbone."""
    folder = workplace / "without_attention"
    command("finetune.py", *FINETUNING, "--backbone.name", "tiny-falcon-mamba", "--finetuning.epochs", "1",
            "--data", prepared_folder, "--encoders", encoders_run, "--out", folder)  # fmt: skip
    return folder


def test_a_state_space_run_has_its_report(without, tmp_path):
    done = command("interpret.py", "--run", without, "--stays-shown", 1, "--interventions", "--out", tmp_path)
    assert "Traceback" not in done.stderr
    page = (tmp_path / "index.html").read_text()
    assert "This run has no attention to show" in page
    assert pl.read_csv(tmp_path / "tables/anchoring.csv")["share_before"].null_count() > 0
    assert pl.read_csv(tmp_path / "tables/trajectories.csv")["ablated"].n_unique() > 1
    assert list((tmp_path / "figures").glob("stay_*_mortality.png"))
    assert not list((tmp_path / "figures").glob("*attention*"))
    effects = pl.read_csv(tmp_path / "tables/importance.csv")
    assert effects.select("removal", "attribution").null_count().row(0) == (0, 0)
    assert effects["knock_out"].null_count() == effects.height
    assert pl.read_csv(tmp_path / "tables/agreement.csv")["disagree"].to_list() == [None]
    assert len(list((tmp_path / "figures").glob("stay_*_mortality_importance.svg"))) == 1


def test_a_run_with_attention_may_stand_beside_one_without(run, without, tmp_path):
    words = ["--run", run, "--against", without, "--stays-shown", 1, "--figures", "--out", tmp_path]
    refused = command("interpret.py", *words, "--interventions", "death", check=False)
    assert last_line(refused) == "error: --interventions death: the run believes in mortality, length_of_stay_hours"
    command("interpret.py", *words, "--interventions", "length_of_stay_hours", "mortality")
    effects = pl.read_csv(tmp_path / "tables/importance.csv")
    assert effects["target"].unique(maintain_order=True).to_list() == ["length_of_stay_hours", "mortality"]
    assert effects.null_count().sum_horizontal().item() == 0
    # Repeated, nothing is measured again.
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/*/*.parquet")}
    command("interpret.py", *words, "--interventions", "mortality")
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.glob("work/*/*.parquet")}


def test_a_state_space_run_has_its_audit(without, tmp_path):
    done = command(*TRAJLM, "anchoring", "--run", without, "--out", tmp_path, "--resamples", 50)
    assert "Traceback" not in done.stderr
    assert "attention on demographics" not in done.stdout
    assert set(pl.read_csv(tmp_path / "summary.csv")["measure"]) == {"drift", "absolute_drift", "flips"}


def test_a_prompt_leaves_ablations_and_attributions():
    model, plain = toy_model(prompt_ids=[5, 2]), toy_model()
    batch = model.encode_timeline(toy_timeline(1))
    assert shown_layer(model) is None
    assert shown_layer(plain) == 1
    assert cohort_ablation(model, [batch], ["labs"])["static_share"].null_count() == 2
    table = event_importance(model, batch, "mortality")
    assert table["attention"].null_count() == table["knock_out"].null_count() == table.height
    assert table.select("removal", "attribution").null_count().row(0) == (0, 0)
    many = toy_batch([3])
    with pytest.raises(TrajlmError, match="knock-out: not for a model with a prompt"):
        knock_out(model, many, edges_of_events(many, torch.ones(1, 3, dtype=torch.bool)))
    with pytest.raises(TrajlmError, match="patching: not for a model with a prompt"):
        patched(model, many, many, torch.ones(1, 3, dtype=torch.bool), 1)
