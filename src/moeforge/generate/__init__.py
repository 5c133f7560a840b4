"""Text out of a model: sampling, streaming with a KV cache, and which experts each token took."""

from moeforge.generate.contrast import Contrast as Contrast
from moeforge.generate.document import ALONE as ALONE
from moeforge.generate.document import Document as Document
from moeforge.generate.document import Written as Written
from moeforge.generate.document import generate as generate
from moeforge.generate.engine import ContextError as ContextError
from moeforge.generate.engine import Engine as Engine
from moeforge.generate.engine import FullError as FullError
from moeforge.generate.engine import Report as Report
from moeforge.generate.opening import engine_for as engine_for
from moeforge.generate.opening import open_engine as open_engine
from moeforge.generate.request import End as End
from moeforge.generate.request import Event as Event
from moeforge.generate.request import Read as Read
from moeforge.generate.request import Request as Request
from moeforge.generate.request import Token as Token
from moeforge.generate.runner import BlockRunner as BlockRunner
from moeforge.generate.sample import Sampling as Sampling
from moeforge.generate.settings import Settings as Settings
from moeforge.generate.trace import Choice as Choice
from moeforge.generate.trace import Traced as Traced
from moeforge.generate.trace import trace as trace
