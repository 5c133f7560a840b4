"""A paper is a recipe: a small YAML file with its claim, its check and what came out, on top of a base recipe."""

from moeforge.recipes.catalogue import RECIPES as RECIPES
from moeforge.recipes.catalogue import load as load
from moeforge.recipes.catalogue import load_tree as load_tree
