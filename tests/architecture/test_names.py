"""One word per thing: no drawer folders, no other project's names, no paper's name in the machinery."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source import ROOT, SRC, identifiers, parse, place, python_files

DRAWERS = {"util", "utils", "utilities", "common", "core", "helper", "helpers", "misc", "lib", "tools", "stuff"}

ALIASES = """
hidden_size hidden_dim embed_dim embedding_dim n_embd n_embed d_embed dim_model model_dim
intermediate_size ffn_hidden_size ffn_dim d_ffn moe_intermediate_size shared_expert_intermediate_size
moe_ffn_hidden_size expert_dim expert_ffn_hidden_size
n_layer n_layers num_hidden_layers num_blocks n_head n_heads num_attention_heads n_kv_heads num_key_value_heads d_head
num_local_experts n_routed_experts num_routed_experts n_experts moe_num_experts total_num_experts
num_experts_per_tok num_experts_per_token num_selected_experts moe_top_k moe_topk moe_k router_topk
n_shared_experts moe_num_shared_experts
norm_topk_prob norm_topk_probs moe_renormalize routed_scaling_factor router_scaling_factor
router_aux_loss_coef aux_loss_coef aux_loss_alpha moe_aux_loss_coeff lb_loss_weight router_z_loss_coef moe_z_loss_coeff
e_score_correction_bias moe_capacity_factor expert_capacity_factor
n_group n_groups topk_group topk_groups first_k_dense_replace decoder_sparse_step moe_layer_freq moe_layer_interval
gating_network vocabulary_size
""".split()

PAPERS = """
switch gshard stmoe mixtral mistral deepseek deepseekmoe deepspeed olmoe olmo qwen llama glam dbrx grok jamba arctic
megablocks loramoe remoe relumoe xmoe monet openmoe skywork granite phimoe hunyuan ernie kimi glm minimax prmoe sonicmoe
""".split()
MACHINERY = [SRC / "moe" / "layer.py", SRC / "models", SRC / "train"]


def words(identifier: str) -> set[str]:
    """``SwitchRouter_v2`` -> switch, router, v2, and the whole: its words and itself without separators."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower()
    return {*re.split(r"[_-]+", split), re.sub(r"[_-]", "", split)}


def drawers(paths: list[Path]) -> list[Path]:
    """The paths of which a part names no content."""
    return [path for path in paths if DRAWERS & {Path(part).stem.strip("_").lower() for part in path.parts}]


def test_no_folder_or_file_is_a_drawer() -> None:
    folders = [folder for folder in ("src", "tests", "benchmarks", "examples", "docs") if (ROOT / folder).is_dir()]
    assert drawers([path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")]) == []


@pytest.mark.parametrize("bad", ["src/moeforge/utils/x.py", "src/moeforge/moe/common.py", "tests/_helpers.py"])
def test_a_drawer_is_found(bad: str) -> None:
    assert drawers([Path(bad), Path("src/moeforge/moe/score.py")]) == [Path(bad)]


def aliases(text: str) -> list[str]:
    """Other projects' names in a file, in order, comments and docstrings included."""
    return re.findall(rf"\b(?:{'|'.join(ALIASES)})\b", text)


def test_other_projects_names_stay_in_the_hub_and_where_another_projects_function_is_called() -> None:
    files = [path for path in (*python_files("src"), *SRC.rglob("*.yaml")) if path != SRC / "models" / "rope.py"]
    found = {
        place(path): aliases(path.read_text(encoding="utf-8")) for path in files if SRC / "hub" not in path.parents
    }
    assert {where: names for where, names in found.items() if names} == {}


def test_an_alias_is_found() -> None:
    assert aliases("x = config.hidden_size  # not my_hidden_size_too\n'n_group'") == ["hidden_size", "n_group"]


def paper_names(tree: ast.AST) -> Iterator[str]:
    """Identifiers and tags that carry a paper's or a model family's name."""
    return (name for name, _ in identifiers(tree) if words(name) & set(PAPERS))


def test_no_paper_is_named_in_the_machinery() -> None:
    inside = [path for path in python_files("src") if any(path.is_relative_to(part) for part in MACHINERY)]
    assert inside, "the machinery has moved: mend MACHINERY"
    assert [f"{place(path)} {name}" for path in inside for name in paper_names(parse(path))] == []


def test_a_paper_is_found() -> None:
    snippet = 'class SwitchRouter:\n    """After Mixtral."""\n    kind = "gshard"\n    switches = pr_moe = 1\n'
    assert sorted(paper_names(ast.parse(snippet))) == ["SwitchRouter", "gshard", "pr_moe"]


def shaped_parameters(tree: ast.AST) -> Iterator[str]:
    """Names of parameters and buffers that end in a shape: a state dict's keys are for ever, shapes are not."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets, value=ast.Call(func=made)):
                names = [t.attr for t in targets if isinstance(t, ast.Attribute)] if _is_parameter(made) else []
            case ast.AnnAssign(target=ast.Attribute(attr=name), value=ast.Call(func=made)):
                names = [name] if _is_parameter(made) else []
            case ast.Call(
                func=ast.Attribute(attr="register_buffer" | "register_parameter"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
            case _:
                continue
        yield from (name for name in names if re.search(r"_[A-Z]+$", name))


def _is_parameter(made: ast.expr) -> bool:
    return isinstance(made, ast.Name | ast.Attribute) and ast.unparse(made).endswith(("Parameter", "Buffer"))


def test_parameters_carry_no_shape() -> None:
    assert [f"{place(path)} {name}" for path in python_files("src") for name in shaped_parameters(parse(path))] == []


def test_a_shaped_parameter_is_found() -> None:
    snippet = """
self.up_EHD = nn.Parameter(x)
self.down_proj = nn.Parameter(y_EDH)
self.bias_E: nn.Parameter = nn.Parameter(z)
self.register_buffer("counts_E", z)
x_TD = self.norm(x)
"""
    assert sorted(shaped_parameters(ast.parse(snippet))) == ["bias_E", "counts_E", "up_EHD"]
