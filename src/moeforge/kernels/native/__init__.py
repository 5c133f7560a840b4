"""Engine ``native``: C++ over the processor's vector units, built on first use (``build.py``)."""

from moeforge.kernels.native.engine import backward as backward
from moeforge.kernels.native.engine import forward as forward
from moeforge.kernels.native.engine import infer as infer
from moeforge.kernels.native.engine import unmeasured as unmeasured
from moeforge.kernels.native.engine import why_not as why_not
from moeforge.kernels.native.quantised import QuantisedWeight as QuantisedWeight
from moeforge.kernels.native.quantised import expert_mlp_quantised as expert_mlp_quantised
from moeforge.kernels.native.quantised import linear_quantised as linear_quantised
from moeforge.kernels.native.quantised import quantise as quantise
