"""Text out of a model: sampling, streaming with a KV cache, and which experts each token took."""

from moeforge.generate.run import Step as Step
from moeforge.generate.run import Writer as Writer
from moeforge.generate.run import generate as generate
from moeforge.generate.sample import Sampling as Sampling
from moeforge.generate.trace import Choice as Choice
from moeforge.generate.trace import Traced as Traced
from moeforge.generate.trace import trace as trace
