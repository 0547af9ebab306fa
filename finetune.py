"""Stage 2: fine-tune a causal LLM on the frozen latents, beside the static baselines.

python finetune.py --config recipes/demo.yaml --data PREPARED --encoders PRETRAINED --out RUN
accelerate launch finetune.py ... on several devices
"""

from trajlm.flags import parse_recipe, recipe_parser, run_command
from trajlm.resources import cost_of


def main() -> None:
    """Parse first: a mistake in a flag should not wait for torch."""
    recipe = parse_recipe(recipe_parser("finetune.py", "Fine-tune the sequence model and the baselines beside it."))
    from trajlm.finetuning import finetune

    with cost_of("finetune.py"):
        finetune(recipe)


if __name__ == "__main__":
    run_command(main)
