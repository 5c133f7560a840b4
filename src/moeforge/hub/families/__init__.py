"""The families whose folders our decoder opens and writes, by ``model_type``; docs/families.md says how to add one."""

from moeforge.hub.families.deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3
from moeforge.hub.families.ernie import ERNIE4_5_MOE
from moeforge.hub.families.family import Family as Family
from moeforge.hub.families.glm import GLM4_MOE
from moeforge.hub.families.gpt_oss import GPT_OSS
from moeforge.hub.families.granite import GRANITEMOE, GRANITEMOESHARED
from moeforge.hub.families.llama import LLAMA
from moeforge.hub.families.mixtral import MIXTRAL
from moeforge.hub.families.olmoe import OLMOE
from moeforge.hub.families.phimoe import PHIMOE
from moeforge.hub.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, QWEN2, QWEN3, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE),
        *(DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS, GRANITEMOE, GRANITEMOESHARED, PHIMOE, GLM4_MOE, ERNIE4_5_MOE),
    )
}
