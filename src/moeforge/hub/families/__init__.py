"""The families whose folders our decoder opens and writes, by ``model_type``. One file each; how to add one is in
docs/families.md."""

from moeforge.hub.families.family import Family as Family
from moeforge.hub.families.llama import LLAMA
from moeforge.hub.families.mixtral import MIXTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MIXTRAL)}
