"""Balance: losses that push the router towards even loads, and controllers that move a bias after each step.

All are functions of what the router returned; none keeps state. A loss is the value for one micro-batch, to be
weighted by that micro-batch's share of the step's tokens: then the sum over micro-batches is the value for the step.
"""

from moeforge.config import slot
from moeforge.moe.balance.conflict import ConflictLoss as ConflictLoss
from moeforge.moe.balance.controllers import ExpertBias as ExpertBias
from moeforge.moe.balance.controllers import Overflow as Overflow
from moeforge.moe.balance.controllers import Sparsity as Sparsity
from moeforge.moe.balance.groups import ClusterLoss as ClusterLoss
from moeforge.moe.balance.groups import CoreLoss as CoreLoss
from moeforge.moe.balance.groups import EmbeddingLoss as EmbeddingLoss
from moeforge.moe.balance.groups import LocalityLoss as LocalityLoss
from moeforge.moe.balance.load import BudgetLoss as BudgetLoss
from moeforge.moe.balance.load import ImportanceLoss as ImportanceLoss
from moeforge.moe.balance.load import LoadBalancingLoss as LoadBalancingLoss
from moeforge.moe.balance.load import LoadLoss as LoadLoss
from moeforge.moe.balance.scores import EntropyLoss as EntropyLoss
from moeforge.moe.balance.scores import GateLoss as GateLoss
from moeforge.moe.balance.scores import SparsityLoss as SparsityLoss
from moeforge.moe.balance.scores import ZLoss as ZLoss

BalanceLoss = slot(
    LoadBalancingLoss,
    ZLoss,
    ImportanceLoss,
    LoadLoss,
    EntropyLoss,
    SparsityLoss,
    ClusterLoss,
    LocalityLoss,
    EmbeddingLoss,
    CoreLoss,
    BudgetLoss,
    ConflictLoss,
    GateLoss,
)
Controller = slot(ExpertBias, Sparsity, Overflow)
