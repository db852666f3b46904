"""Recipes: one file per run, each with `recipe() -> Trainer.Config`; a recipe's docstring is its claim."""
