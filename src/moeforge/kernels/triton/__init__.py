"""Engine ``triton``: a routed MLP in three launches on a GPU, its gradients in five.

The rows of a tile are gathered while a product loads them; the activation, the combine weight and a row's place among
its token's rows are applied where a product stores its result. The one [N, D] tensor is what each token's sum reads:
summing in place would need atomics, hence an order that varies.
"""

from moeforge.kernels.triton.engine import backward as backward
from moeforge.kernels.triton.engine import forward as forward
from moeforge.kernels.triton.engine import why_not as why_not
