"""The code that goes along with a model: complete, and enough where moeforge cannot be imported."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from moeforge import __version__
from moeforge.hub import load
from moeforge.hub.remote import FOLDER, carry, files, rewritten
from moeforge.models import ModelConfig
from tests.hub import own

OPEN = """
import sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "moeforge":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
source, again, out = sys.argv[1:]
import torch
from transformers import AutoModelForCausalLM

try:
    AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
except ValueError as error:
    print(error)
for folder in (source, again):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(again)
ids = torch.arange(20)[None]
text = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=256)
torch.save({"logits": model(ids).logits.detach(), "text": text}, out)
"""


@pytest.mark.parametrize("shape", ["mixed routers"])
def test_a_machine_without_moeforge_opens_the_folder_and_saves_it(tmp_path, shape):
    pytest.importorskip("transformers")
    folder = own.write(tmp_path / "my-model.v1", own.SHAPES[shape])
    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    places = [str(place) for place in (folder, tmp_path / "again", tmp_path / "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *places], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pass the argument `trust_remote_code=True`" in done.stdout, "what transformers says without it"
    found, ids = torch.load(tmp_path / "out.pt"), torch.arange(20)[None]
    ours, tokenizer = load(folder)
    torch.testing.assert_close(found["logits"], ours(ids).logits, atol=1e-5, rtol=0)
    tokenizer.save(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, atol=1e-5, rtol=0)
    assert len(found["text"][0]) > 20


def test_every_file_says_what_it_is_and_finds_the_others():
    for name, text in files().items():
        compile(text, name, "exec")
        assert f"of moeforge {__version__}" in text.splitlines()[0]
        assert not re.search(r"^\s*(import|from) moeforge", text, flags=re.MULTILINE)
        for module in re.findall(r"^\s*from \.(\S+) import", text, flags=re.MULTILINE):
            assert f"{module}.py" in files()
    assert {"hub_auto_config.py", "hub_auto_model.py", "moe_select_fixed.py", "kernels_grouped.py"} <= files().keys()


def test_imports_are_rewritten_and_nothing_else():
    source = """from torch import nn
from moeforge import __version__
from moeforge.config import (
    Config,
    slot as chosen,
)
import triton
def f():
    from moeforge.kernels import grouped, expert_mlp
    return "from moeforge.config import x"
"""
    text, needed = rewritten(source)
    assert (
        text
        == f"""from torch import nn
__version__ = '{__version__}'
from .config import Config
from .config import slot as chosen
try:
    import triton
except ImportError:
    raise
def f():
    from .kernels_grouped import __doc__ as _
    from . import kernels_grouped as grouped
    from .kernels import expert_mlp
    return "from moeforge.config import x"
"""
    )
    assert needed == {"config", "kernels.grouped", "kernels"}


class Mine:
    """A stand-in for somebody's settings."""

    def model_dump(self) -> dict:
        """A router of theirs, somewhere inside."""
        return {"layers": {2: {"moe": {"experts": [{"type": "mlp"}], "select": {"type": "their.routing:Best"}}}}}


def test_parts_of_others_are_not_carried_and_the_folder_says_what_it_needs(tmp_path):
    assert carry(Mine(), tmp_path) == {"needs": ["moeforge", "their"]}
    assert list(tmp_path.iterdir()) == []
    assert "auto_map" in carry(ModelConfig.model_validate(own.SHAPE | own.PYRAMID), tmp_path)


def test_the_files_stand_apart_from_the_weights(tmp_path):
    folder = own.write(tmp_path / "m")
    assert not list(folder.glob("*.py")) and (folder / FOLDER / "models_decoder.py").exists()
    assert json.loads((folder / "config.json").read_text())["auto_map"].keys() == {"AutoConfig", "AutoModelForCausalLM"}
