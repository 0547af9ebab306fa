"""Stage 3: explain a fine-tuned run in one HTML file.

python interpret.py --run RUN --out REPORT [--stay ID ...] [--ablate MODALITY ...]
"""

from trajlm.flags import PlainParser, run_command
from trajlm.resources import cost_of


def main() -> None:
    """Parse first: a mistake in a flag should not wait for torch."""
    parser = PlainParser(
        prog="interpret.py",
        description="Belief trajectories, attention heatmaps and missing-modality ablations of a fine-tuned run, as "
        "one HTML file that opens with no network.",
    )
    parser.add_argument("--run", required=True, help="run folder of finetune.py")
    parser.add_argument("--out", required=True, help="folder of the report; open index.html in it")
    parser.add_argument("--data", help="prepared folder, if it moved since fine-tuning")
    parser.add_argument(
        "--stay", nargs="+", type=int, default=[], help="stays to show (default: those that diverge most)"
    )
    parser.add_argument("--ablate", nargs="+", default=[], help="modalities to ablate (default: each in turn)")
    parser.add_argument("--stays-shown", type=int, default=6, help="how many stays to show when none is named")
    parser.add_argument(
        "--audit-stays", type=int, default=256, help="held-out stays ablated for the cohort's tables (0: all)"
    )
    parser.add_argument(
        "--against", metavar="RUN2", help="a second run on the same prepared folder, shown beside the first"
    )
    parser.add_argument(
        "--figures", nargs="*", choices=["png", "svg"], default=["png", "svg"], help="files to write of every figure"
    )
    parser.add_argument(
        "--interventions",
        nargs="*",
        metavar="TARGET",
        help="also remove, cut off and attribute each event of the stays shown, and say where that disagrees with "
        "attention, for these targets (none named: the first). Off by default: it reads a stay two times per event, "
        "and takes 16 or more gradients of it for each target",
    )
    parser.add_argument("--show-notes", action="store_true", help="show the text of notes (default: only their length)")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    arguments = vars(parser.parse_args())
    arguments.pop("debug")
    from trajlm.report.run import InterpretConfig, interpret

    with cost_of("interpret.py"):
        interpret(InterpretConfig(**arguments))


if __name__ == "__main__":
    run_command(main)
