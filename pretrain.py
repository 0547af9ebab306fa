"""Stage 1: pretrain the encoders with Masked Global Alignment.

python pretrain.py --config recipes/demo.yaml --data PREPARED --out RUN
"""

from pathlib import Path

from trajlm.flags import parse_recipe, recipe_parser, run_command
from trajlm.resources import cost_of


def main() -> None:
    """Parse first: a mistake in a flag should not wait for torch."""
    recipe = parse_recipe(
        recipe_parser("pretrain.py", "Pretrain encoders and missing tokens with Masked Global Alignment.")
    )
    from accelerate import PartialState

    from trajlm.pretraining import pretrain
    from trajlm.report.alignment import alignment_report

    with cost_of("pretrain.py"):
        run = pretrain(recipe)
        if PartialState().is_main_process:
            print(alignment_report(run, Path(recipe.data) if recipe.data else None))


if __name__ == "__main__":
    run_command(main)
