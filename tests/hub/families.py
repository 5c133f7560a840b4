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

DENSE = {name: (f"{name.title()}ForCausalLM", {}) for name in ("llama", "qwen2", "qwen3")}
"""Families without experts, as FAMILIES."""

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
MULTIPLIERS = {
    **{"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 2.0},
}

NATIVE: dict[str, dict[str, dict[str, object]]] = {
    "llama": {
        "tied, shared keys": {"tie_word_embeddings": True, "num_key_value_heads": 1},
        "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
        "gelu, llama3 positions": {
            "hidden_act": "gelu",
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
            },
        },
        "linear positions": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0}},
    },
    "qwen2": {
        "plain": {},
        "window in the upper layer": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    },
    "qwen3": {"plain": {}, "tied": {"tie_word_embeddings": True, "attention_bias": True}},
    "mixtral": {
        "plain": {},
        "window": {"sliding_window": 4, "head_dim": 24},
        "tied": {"tie_word_embeddings": True},
        "one expert": {"num_experts_per_tok": 1},
    },
    "olmoe": {"plain": {}, "clipped, normalised": {"clip_qkv": 0.5, "norm_topk_prob": True}},
    "qwen2_moe": {
        "plain": {},
        "step 2, normalised": {"decoder_sparse_step": 2, "norm_topk_prob": True},
        "dense on top, window": {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 4},
        "without experts": {"mlp_only_layers": [0, 1], "qkv_bias": False},
    },
    "qwen3_moe": {
        "plain": {},
        "step 2, tied": {"decoder_sparse_step": 2, "tie_word_embeddings": True, "norm_topk_prob": True},
        "window": {"use_sliding_window": True, "sliding_window": 4},
    },
    "deepseek_v2": {
        "plain": {},
        "groups, one query matrix": {
            **{"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "q_lora_rank": None},
            **{"first_k_dense_replace": 0, "routed_scaling_factor": 3.0},
        },
        "biases, yarn": {
            **{"attention_bias": True, "mlp_bias": True, "n_shared_experts": 2},
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    },
    "deepseek_v3": {
        "groups": {},
        "yarn, not normalised": {
            **{"norm_topk_prob": False, "n_group": 1, "q_lora_rank": None, "rope_interleave": False},
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "values wider than keys": {"v_head_dim": 24},
    },
    "gpt_oss": {
        "plain": {"sliding_window": 4},
        "all layers see all": {"layer_types": ["full_attention"] * 2, "swiglu_limit": 0.5, "attention_bias": False},
    },
    "granitemoe": {"multipliers": MULTIPLIERS, "biases, tied": {"attention_bias": True, "tie_word_embeddings": True}},
    "granitemoeshared": {"multipliers": MULTIPLIERS, "nothing shared": {"shared_intermediate_size": 0}},
    "phimoe": {
        "wide margin": {"router_jitter_noise": 0.3},
        "biases, window": {"attention_bias": True, "lm_head_bias": True, "sliding_window": 4},
        "longrope": {
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8},
                **{"short_factor": [1.0 + n / 8 for n in range(8)], "long_factor": [2.0 + n / 8 for n in range(8)]},
                **{"short_mscale": 1.1, "long_mscale": 1.3},
            }
        },
    },
    "glm4_moe": {
        "groups, normed queries": {"use_qk_norm": True, "n_group": 3, "topk_group": 2},
        "biases, not normalised": {
            "attention_bias": True,
            "norm_topk_prob": False,
            "n_shared_experts": 2,
            "n_group": 1,
        },
    },
    "ernie4_5_moe": {
        "tied": {},
        "tied, biases": {"use_bias": True},
        "biases, every second": {"use_bias": True, "tie_word_embeddings": False, "moe_layer_interval": 2},
        "nothing shared": {"moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 0},
    },
}
"""Native family -> what is tried of it."""

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
    class_name, settings = (FAMILIES | DENSE)[family]
    model = make(class_name, settings | changes)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.ndim > 1 else weight + noise / 10)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) / 3)
    return model


def run(model: nn.Module, implementation: str, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, or last hidden states where there is no head, and the gradients of one fixed scalar of them."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(input_ids=ids, use_cache=False)[0]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
