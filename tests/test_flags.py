"""A mistake on the command line is one line that says what to do."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import ROOT

from trajlm import cli
from trajlm.errors import TrajlmError
from trajlm.flags import PlainParser, parse_recipe, recipe_parser


def parse(*words: object):
    return parse_recipe(recipe_parser("finetune.py", ""), [str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--finetuning.epohcs", 3], "'finetuning.epohcs' is not a setting; the nearest is 'finetuning.epochs'"),
        (["--finetuning.linear-readout", "true"], "linear-readout' .*the nearest is 'finetuning.linear_readout'"),
        (["--finetuning.baselines", "mlp"], r"finetuning.baselines is a list, came mlp; write .*'\[mlp\]'"),
        (["--finetuning.tasks", "mortality, length_of_stay"], r"write .*'\[mortality, length_of_stay\]'"),
        (["--prepare.bin_hours", 3], "--prepare.bin_hours is read by `trajlm prepare` alone, as --bin-hours"),
        (["--prepare.bin_hours=3"], "--prepare.bin_hours is read by `trajlm prepare` alone"),
    ],
)
def test_a_wrong_flag_of_a_script_is_told_the_right_one(words, said):
    with pytest.raises(TrajlmError, match=said):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected keys of a recipe and their values, came an empty file"),
        ("# nothing yet\n", "came an empty file"),
        ("3\n", "came 3"),
        ("finetuning:\n", "section finetuning: expected keys and values, came nothing; leave it out"),
        ("seed: 1\npretraining:\n#  epochs: 3\nfinetuning:\n  epochs: 2\n", "section pretraining: .* leave it out"),
        ("prepare: 3\n", "section prepare: expected keys and values, came 3"),
        ("prepare: [cohort]\n", r"section prepare: expected keys and values, came \['cohort'\]"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_recipe_without_content_is_told_so(tmp_path, text, said, form):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(TrajlmError, match=rf"recipe.yaml: .*{said}"):
        parse(*form.format(tmp_path / "recipe.yaml").split())


def test_a_bare_off_is_told(tmp_path):
    (tmp_path / "recipe.yaml").write_text("finetuning: {time_encoding: off}\n")
    with pytest.raises(TrajlmError, match=r"finetuning.time_encoding: a bare off is false in YAML; write 'off'"):
        parse("--config", tmp_path / "recipe.yaml")


def test_the_papers_reading_as_the_readme_states_it_is_a_recipe(tmp_path):
    readme = " ".join((ROOT / "README.md").read_text().split())
    told = readme[readme.index("The paper's own reading") :].partition("Published splits")[0]
    keys = [key.split(": ") for key in re.findall(r"`([\w.]+: [^`]+)`", told)]
    assert len(keys) == 9
    text = "\n".join(f"  {key}: {value}" for key, value in keys if key != "encoder.state")
    (tmp_path / "recipe.yaml").write_text(f"encoder: {{state: false}}\nfinetuning:\n{text}\n")
    recipe = parse("--config", tmp_path / "recipe.yaml")
    assert (recipe.finetuning.time_encoding, recipe.finetuning.readout) == ("off", "predict")
    assert recipe.encoder.state is False


def test_every_recipe_parses():
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        held = yaml.safe_load(recipe.read_text())
        assert parse("--config", recipe).finetuning.epochs == held.get("finetuning", {}).get("epochs", 20)


def settings(*words: object):
    return cli._settings(cli._parser().parse_args(["prepare", "--out", "x", *map(str, words)]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cohort", "mimic", "--sets", "a"], "--sets is read by cohort physionet2012, not by mimic"),
        (["--cohort", "physionet2012", "--notes-folder", "n"], "--notes-folder is read by cohort synthetic and mimic"),
        (["--cohort", "eicu", "--mapping", "m.yaml"], "--mapping is read by cohort meds, not by eicu"),
        (["--paper-faithful", "--result-times", "available"], "contradicts paper_faithful"),
        (["--bin-hours", "abc"], "invalid float value: 'abc'"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(words, said):
    with pytest.raises(TrajlmError, match=said):
        settings(*words)


@pytest.mark.parametrize("flags", [["--result-times", "available"], ["--window-hours", 24]])
def test_a_recipe_that_follows_the_paper_is_not_contradicted_in_silence(tmp_path, flags):
    (tmp_path / "recipe.yaml").write_text("prepare: {cohort: eicu, paper_faithful: true}\n")
    with pytest.raises(TrajlmError, match=r"contradicts .*paper_faithful"):
        settings("--config", tmp_path / "recipe.yaml", *flags)


def test_flags_that_a_cohort_reads_are_taken():
    assert settings("--cohort", "physionet2012", "--sets", "a", "b").sets == ["a", "b"]
    assert settings("--cohort", "eicu", "--least-code-share", 0.1).least_code_share == 0.1
    # Of a cohort that somebody adds it is not known what it reads.
    assert settings("--cohort", "mine", "--sets", "a").cohort == "mine"
    assert settings("--paper-faithful").result_times == "charted"


def test_a_plain_mistake_is_one_line():
    parser = PlainParser(prog="trajlm x")
    parser.add_argument("--run", required=True)
    with pytest.raises(TrajlmError) as error:
        parser.parse_args([])
    assert str(error.value).splitlines() == [
        "the following arguments are required: --run (trajlm x --help tells them all)"
    ]
