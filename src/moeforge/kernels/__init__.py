"""Expert matmuls: one signature (``expert_mlp``), several engines, one chooser."""

from moeforge.kernels.choose import ENGINES as ENGINES
from moeforge.kernels.choose import choose as choose
from moeforge.kernels.edges import Edges as Edges
from moeforge.kernels.edges import sum_by_token as sum_by_token
from moeforge.kernels.mlp import expert_mlp as expert_mlp
