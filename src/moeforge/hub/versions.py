"""Folders of other versions: a setting that this one does not know is refused, and told by which version it was set."""

from moeforge import __version__
from moeforge.config import Tree, build
from moeforge.errors import UserError
from moeforge.models.config import ModelConfig


def model_config(tree: Tree, source: str) -> ModelConfig:
    """The decoder's settings in a ``config.json``. Raises UserError with every mistake, as ``build`` does."""
    try:
        return build(ModelConfig, tree.get("model") or {}, source=source)
    except UserError as error:
        writer = tree.get("moeforge_version")
        if writer in (None, __version__):
            raise
        raise UserError(f"{error}\n{source} was written by moeforge {writer}, this is {__version__}") from error
