"""Stage 1: pretrain the encoders with Masked Global Alignment.

python pretrain.py --config recipes/demo.yaml --data PREPARED --out RUN
"""

from trajlm.config import parse_recipe, recipe_parser, run_command
from trajlm.resources import cost_of


def main() -> None:
    """Parse first: a mistake in a flag should not wait for torch."""
    recipe = parse_recipe(
        recipe_parser("pretrain.py", "Pretrain encoders and missing tokens with Masked Global Alignment.")
    )
    from trajlm.pretraining import pretrain

    with cost_of("pretrain.py"):
        pretrain(recipe)


if __name__ == "__main__":
    run_command(main)
