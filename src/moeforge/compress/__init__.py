"""From a budget to a folder that runs: a profile of the experts, a plan of what becomes of each, packed weights."""

from moeforge.compress.plan import Plan as Plan
from moeforge.compress.plan import Row as Row
from moeforge.compress.profile import Profile as Profile
