"""Training: one config, one loop, one run folder."""

from moeforge.train.config import RecipeNote as RecipeNote
from moeforge.train.config import RunConfig as RunConfig
from moeforge.train.loop import Run as Run
from moeforge.train.loop import choose_device as choose_device
from moeforge.train.loop import train as train
