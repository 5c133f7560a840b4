"""One config-driven decoder, and what it counts to."""

from moeforge.models.config import LayerConfig as LayerConfig
from moeforge.models.config import ModelConfig as ModelConfig
from moeforge.models.count import Size as Size
from moeforge.models.count import dense_twin as dense_twin
from moeforge.models.count import measure as measure
from moeforge.models.decoder import Cache as Cache
from moeforge.models.decoder import Decoder as Decoder
from moeforge.models.decoder import Output as Output
from moeforge.models.extract import extract as extract
