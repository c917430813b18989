"""The model card: the README of an exported model."""

from collections.abc import Mapping
from typing import Any


def model_card(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return the model card: what the model is, how it was trained, how to load it.

    Nothing in it depends on the time or the machine's speed, so equal trainings export equal folders.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in {**facts, **metrics}.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [deepseek_v3, mixture-of-experts]
---

# A small DeepSeek-V3

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)  # trust_remote_code=True: the code beside the weights
print(tokenizer.decode(model.generate(**tokenizer("ROMEO:", return_tensors="pt"), max_new_tokens=100)[0]))
```

With transformers' own `DeepseekV3ForCausalLM` and with the code in this folder the logits are the same; the latter adds
multi-token prediction, the balancing state of the routers, and decoding on the latent cache.
"""
