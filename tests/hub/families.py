"""Every family of transformers with experts, as a model of two layers that is built in milliseconds."""

import re
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

TINY = {
    **{name: 64 for name in ("vocab_size", "max_position_embeddings", "vocab_size_per_layer_input")},
    **{name: 32 for name in ("hidden_size", "head_hidden_size")},
    **{name: 24 for name in ("intermediate_size", "dense_intermediate_size")},
    **{
        name: 16
        for name in (
            "moe_intermediate_size moe_hidden_size shared_expert_intermediate_size shared_intermediate_size "
            "moe_shared_expert_intermediate_size head_dim v_head_dim global_head_dim index_head_dim q_lora_rank "
            "kv_lora_rank mamba_head_dim router_hidden_size"
        ).split()
    },
    **{
        name: 8
        for name in (
            "qk_nope_head_dim qk_rope_head_dim index_topk linear_key_head_dim linear_value_head_dim linear_head_dim "
            "mamba_d_state ssm_state_size"
        ).split()
    },
    **{name: 6 for name in "num_experts num_local_experts n_routed_experts num_routed_experts moe_num_experts".split()},
    **{
        name: 2
        for name in (
            "num_hidden_layers num_attention_heads num_key_value_heads num_global_key_value_heads index_n_heads "
            "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts n_group "
            "linear_num_value_heads linear_num_key_heads linear_num_heads hc_mult eos_token_id"
        ).split()
    },
    **{name: 1 for name in "topk_group first_k_dense_replace n_shared_experts num_shared_experts bos_token_id".split()},
    "swiglu_limit": 1.0,  # so that rows do reach the limit
    **{name: 0 for name in "num_dense_layers pad_token_id hidden_size_per_layer_input num_kv_shared_layers".split()},
}
"""Settings by the names that configs give them; each config gets those that it has."""

SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "afmoe": ("AfmoeForCausalLM", {}),
    "aria": ("AriaTextForCausalLM", {}),
    "axk1": ("AXK1ForCausalLM", {}),
    "axk2": ("AXK2ForCausalLM", {}),
    "bailing_hybrid": ("BailingHybridForCausalLM", {}),
    "beam": ("BeamForCausalLM", {"mlp_layer_types": ["sparse", "sparse"]}),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "deepseek_ocr2": ("DeepseekOcr2TextModel", SPARSE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", {}),
    "deepseek_v4": ("DeepseekV4ForCausalLM", {}),
    "diffusion_gemma": ("DiffusionGemmaEncoderTextModel", {}),
    "dots1": ("Dots1ForCausalLM", {}),
    "dots3_note": ("Dots3NoteForCausalLM", {}),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeTextModel",
        {"moe_intermediate_size": [16, 8], "rope_parameters": {**ROPE, "mrope_section": [2, 2, 4]}},
    ),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "flint": ("FlintForCausalLM", {"mlp_only_layers": []}),
    "gemma4": ("Gemma4ForCausalLM", {"enable_moe_block": True}),
    "glm4_moe": ("Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", {}),
    "glm4v_moe": (
        "Glm4vMoeTextModel",
        {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    ),
    "glm5_next": (
        "Glm5NextTextModel",
        {**SPARSE, "layer_types": ["linear_attention", "indexed_attention"], "index_kpool": 4, "qk_rope_head_dim": 0},
    ),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {"mamba_n_heads": 4, "layer_types": ["mamba", "attention"]}),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4ForCausalLM", {}),
    "inkling": ("InklingForCausalLM", {}),
    "inkling2": ("Inkling2ForCausalLM", {}),
    "jamba": (
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_linear": ("KimiLinearForCausalLM", {}),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {"head_dim": 24, "num_key_value_heads": 1}),
    "minimax": ("MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3VLForCausalLM", {}),
    "mistral4": ("Mistral4ForCausalLM", {}),
    "mistral_large4": ("MistralLarge4TextModel", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "muse_spark": ("MuseSparkTextModel", {}),
    "nemotron_h": ("NemotronHForCausalLM", {"layers_block_type": ["attention", "moe"]}),
    "olmoe": ("OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterModel", {}),
    "phimoe": ("PhimoeForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextForCausalLM", {}),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextModel", {}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextModel", {}),
    "qwen4_exp": ("Qwen4ExpForCausalLM", {}),
    "solar_open": ("SolarOpenForCausalLM", {}),
    "unlimited_ocr": ("UnlimitedOcrTextModel", SPARSE),
    "zaya": ("ZayaForCausalLM", {"num_experts_per_tok": 1}),
}
"""Folder of the family in transformers -> the class built, and what its config needs besides TINY."""

LOOPED = {
    "beam",
    "deepseek_v4",
    "diffusion_gemma",
    "gemma4",
    "glm5_next",
    "gpt_oss",
    "hy_v4",
    "inkling2",
    "minimax_m3_vl",
    "muse_spark",
    "nemotron_h",
    "openai_privacy_filter",
}
"""Families that run expert by expert: the kernels don't know their activation, biases or norms."""

UNFIT: dict[str, tuple[str, dict[str, object]]] = {
    "dbrx": ("DbrxForCausalLM", {"attn_config": {"rope_theta": 1e4}}),
    "doge": ("DogeForCausalLM", {"is_moe": True}),
    "jetmoe": ("JetMoeForCausalLM", {}),
    "llama4_text": ("Llama4ForCausalLM", {}),
    "longcat_flash": ("LongcatFlashForCausalLM", {}),
    "nllb-moe": ("NllbMoeForConditionalGeneration", {}),
    "step3p5": ("Step3p7TextModel", {}),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", {}),
    "vitpose_backbone": ("VitPoseBackbone", {"num_experts": 2, "part_features": 8}),
}
"""model_type of families with experts that don't use the experts interface."""


def declared() -> set[str]:
    """Folders of transformers in which a class declares the experts interface."""
    folder = Path(transformers.__file__).parent / "models"
    files = folder.glob("*/modeling_*.py")
    marked = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    return {path.parent.name for path in files if marked.search(path.read_text(encoding="utf-8"))}


def make(class_name: str, changes: dict[str, object]) -> nn.Module:
    """The model as transformers starts it."""
    made = getattr(transformers, class_name)
    fields, renamed = made.config_class.__dataclass_fields__, made.config_class.attribute_map
    known = {name for name in TINY if name in fields or (name in renamed and renamed[name] not in TINY)}
    return made(made.config_class(**{name: TINY[name] for name in known} | changes)).eval()


def build(family: str, **changes: object) -> nn.Module:
    """The model of a family, its config changed, with weights large enough that routes differ and experts matter."""
    torch.manual_seed(0)
    class_name, settings = FAMILIES[family]
    model = make(class_name, settings | changes)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.ndim > 1 else weight + noise / 10)
    return model


def run(model: nn.Module, implementation: str, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, or last hidden states where there is no head, and the gradients of one fixed scalar of them."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(input_ids=ids, use_cache=False)[0]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
