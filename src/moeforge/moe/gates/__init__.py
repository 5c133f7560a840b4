"""Gate: rows -> one logit per expert. The part of a router that owns parameters.

Every gate is called with (rows [T, D], context) and gives a ``Signal``. All decide in float32, also in a bf16 model.
"""

from moeforge.config import slot
from moeforge.moe.gates.codes import SmoothStep
from moeforge.moe.gates.experts import ActivationNorm, Competition
from moeforge.moe.gates.known import Hash, Lookup
from moeforge.moe.gates.paths import Paths
from moeforge.moe.gates.query import Query
from moeforge.moe.gates.row import MLP, Cosine, Distance, Linear, Recurrent, TwoLevel
from moeforge.moe.gates.signal import Signal as Signal
from moeforge.moe.gates.spline import Spline

Gate = slot(
    Linear,
    Cosine,
    MLP,
    TwoLevel,
    Recurrent,
    Distance,
    Hash,
    Lookup,
    Spline,
    SmoothStep,
    ActivationNorm,
    Competition,
    Paths,
    Query,
    default=Linear,
)
