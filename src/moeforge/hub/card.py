"""The model card of a folder that came without one: what the model is, counted, and how it is opened."""

from moeforge import __version__
from moeforge.models import ModelConfig, measure


def card(name: str, model_type: str, config: ModelConfig) -> str:
    """The text of its README.md."""
    size = measure(config)
    sparse = [layer.moe for layer in config.all_layers if layer.moe]
    experts = ""
    if sparse:
        counts = sorted({moe.num_experts for moe in sparse})
        chosen = sparse[0].router.select.mean_experts(sparse[0].num_experts)
        experts = f" {len(sparse)} of them with {' or '.join(map(str, counts))} experts, {chosen:g} per token."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{model_type}{", moe" if sparse else ""}]
---

# {name}

A decoder of {config.num_layers} layers, {config.d_model} wide.{experts}
{size.total.all:,} parameters, of which a token uses {size.active.all:,}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

Written by moeforge {__version__}. Data, licence and results are for its author to add.
"""
