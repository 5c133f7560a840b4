"""Bank: a stack of same-shaped experts."""

from moeforge.config import slot
from moeforge.moe.bank.base import Bank as Bank
from moeforge.moe.bank.base import by_expert as by_expert
from moeforge.moe.bank.base import matrix as matrix
from moeforge.moe.bank.biased import Clamp as Clamp
from moeforge.moe.bank.constant import ConstantExperts as ConstantExperts
from moeforge.moe.bank.constant import CopyExperts as CopyExperts
from moeforge.moe.bank.constant import ZeroExperts as ZeroExperts
from moeforge.moe.bank.low_rank import LowRankExperts as LowRankExperts
from moeforge.moe.bank.memory import NeuronExperts as NeuronExperts
from moeforge.moe.bank.memory import ValueExperts as ValueExperts
from moeforge.moe.bank.mlp import FactorisedExperts as FactorisedExperts
from moeforge.moe.bank.mlp import MLPExperts as MLPExperts
from moeforge.moe.bank.mlp import NestedExperts as NestedExperts

Experts = slot(
    MLPExperts,
    FactorisedExperts,
    LowRankExperts,
    NestedExperts,
    NeuronExperts,
    ValueExperts,
    ZeroExperts,
    CopyExperts,
    ConstantExperts,
    default=MLPExperts,
)
