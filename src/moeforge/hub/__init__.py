"""Model folders: the one format that every verb opens."""

from moeforge.hub.folder import load as load
from moeforge.hub.folder import save as save
