"""Recipes: a file that says all that `tfqc.compile` is given, checked as it is read."""

from tfqc.recipe.recipe import Recipe, check_recipe

__all__ = ["Recipe", "check_recipe"]
