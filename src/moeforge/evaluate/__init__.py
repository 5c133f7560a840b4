"""How good a model is, in units that do not depend on its tokenizer."""

from moeforge.evaluate.bits import Score as Score
from moeforge.evaluate.bits import bits_per_byte as bits_per_byte
from moeforge.evaluate.bits import summed_loss as summed_loss
