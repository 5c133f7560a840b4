"""Granite 3 MoE: softmax over the chosen experts, and four multipliers for a width-independent learning rate."""

from collections.abc import Mapping
from typing import Any

from moeforge.hub.families.decoder import activation, biases, decoder, heads
from moeforge.hub.families.family import Family
from moeforge.hub.families.names import ATTENTION, FRAME, LAYER, ROUTER
from moeforge.hub.families.rows import At, Joint, Row, Settings, Tree
from moeforge.hub.layout import Layout, Names

ROWS: tuple[Row, ...] = (
    *decoder(eps=1e-6, context=2048),
    *heads(),
    biases("attention_bias", False),
    At("embedding_multiplier", 1.0, "embedding_scale"),
    At("residual_multiplier", 1.0, "residual_scale"),
    At("attention_multiplier", 1.0, "attention.scale"),
    At("logits_scaling", 1.0, "logits_divisor"),
    At("num_local_experts", 8, "moe.experts.num_experts"),
    At("num_experts_per_tok", 2, "moe.router.select.k"),
    At("intermediate_size", 11008, "moe.experts.d_expert"),
)

EXPERTS = f"{LAYER}block_sparse_moe"
NAMES: Names = {
    **FRAME,
    **ATTENTION,
    ROUTER: (Layout((f"{EXPERTS}.router.layer.weight",)), Layout((f"{EXPERTS}.router.weight",))),
    "blocks.{layer}.moe.banks.0.gate_up_proj": (
        Layout((f"{EXPERTS}.input_linear.weight",)),
        Layout((f"{EXPERTS}.experts.gate_up_proj",)),
    ),
    "blocks.{layer}.moe.banks.0.down_proj": (
        Layout((f"{EXPERTS}.output_linear.weight",)),
        Layout((f"{EXPERTS}.experts.down_proj",)),
    ),
}
SETTINGS: Tree = {"moe": {"router": {"score": "logits", "weigh": "softmax", "losses": []}}}


def _shared() -> Joint:
    def read(theirs: Mapping[str, Any]) -> Tree:
        width = theirs["shared_intermediate_size"]
        return {"moe.shared.d_expert": width} if width else {"moe.shared": None}

    def write(ours: Settings) -> Tree:
        return {"shared_intermediate_size": ours.get("moe.shared.d_expert", 0)}

    return Joint({"shared_intermediate_size": 0}, read, write)


GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    rows=(*ROWS, activation("moe.experts.activation")),
    names=NAMES,
    settings=SETTINGS,
)

GRANITEMOESHARED = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    rows=(*ROWS, _shared(), activation("moe.experts.activation moe.shared.activation")),
    names={
        **NAMES,
        "blocks.{layer}.moe.shared.mlp.gate_up_proj.weight": (Layout((f"{LAYER}shared_mlp.input_linear.weight",)),),
        "blocks.{layer}.moe.shared.mlp.down_proj.weight": (Layout((f"{LAYER}shared_mlp.output_linear.weight",)),),
    },
    settings=SETTINGS,
)
