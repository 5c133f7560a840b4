"""Engine ``triton``: a routed MLP in three launches on a GPU, its gradients in four; nothing [N, D] but the last sum.

The rows of a tile are gathered while a product loads them, and the activation, the combine weight and the order in
which a token's rows are summed are applied where a product stores its result.
"""

from moeforge.kernels.triton.engine import backward as backward
from moeforge.kernels.triton.engine import forward as forward
from moeforge.kernels.triton.engine import why_not as why_not
