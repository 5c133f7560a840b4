"""The layer, one file per symbol of the papers' equation: gate, score, select, weigh, bank, balance."""

from moeforge.moe.bank import Bank as Bank
from moeforge.moe.bank import MLPExperts as MLPExperts
from moeforge.moe.context import Context as Context
from moeforge.moe.layer import MoE as MoE
from moeforge.moe.layer import MoEConfig as MoEConfig
from moeforge.moe.merge import MergedRoute as MergedRoute
from moeforge.moe.route import Route as Route
from moeforge.moe.route import SoftRoute as SoftRoute
from moeforge.moe.router import Router as Router
from moeforge.moe.router import RouterConfig as RouterConfig
from moeforge.moe.router import Routing as Routing
