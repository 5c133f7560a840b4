"""Model folders: the one format that every verb opens."""

from moeforge.hub.folder import load as load
from moeforge.hub.folder import open_model as open_model
from moeforge.hub.folder import read_config as read_config
from moeforge.hub.folder import save as save
