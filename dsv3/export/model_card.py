"""The model card: the README of an exported model, and its metadata, from which the Hub makes search and tables.

The scores are those that a training knows when it ends: the validation loss of the weights that are exported. Stage
`evaluate` reads the finished folder, so its score of the held-out text can't stand in it; the card says where it is.
"""

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dsv3.markdown import escaped, table
from mini_model.validation_deepseek import other_variants

NAME = "A small DeepSeek-V3"

PUBLIC_DOMAIN = "public domain"
"""How the licence begins of a text in which nobody has rights: the weights are under the code's licence then."""

UNKNOWN_TERMS = (
    "The code is under the MIT licence. This project does not know the terms of the text, so the licence of the "
    "weights is unknown: state it, and the language, above."
)
STATED_TERMS = (
    "The code is under the MIT licence. This project does not know what follows for the weights, so their licence is "
    "unknown: state it above."
)
INHERITED_TERMS = (
    "The code is under the MIT licence. The training began with the weights of another model, or learned from its "
    "predictions; this project does not know that one's terms, so the licence of these weights is unknown: state it "
    "above."
)
INITIAL_WEIGHTS = "initial weights"
"""The fact that names the model with which a training began."""
TEACHERS = "teachers"
"""The fact that names the models from whose predictions it learned."""


def terms_of(facts: Mapping[str, Any], manifest: Mapping[str, Any]) -> tuple[str, str]:
    """Return the licence of the weights, in the Hub's words, and what the card says of it."""
    stated = str(manifest.get("license") or "")
    if INITIAL_WEIGHTS in facts or TEACHERS in facts:
        return "unknown", INHERITED_TERMS
    if not stated:
        return "unknown", UNKNOWN_TERMS
    if stated.startswith(PUBLIC_DOMAIN):
        return "mit", f"Of the text: {stated}. Code and weights are under the MIT licence."
    return "unknown", f"Of the text: {stated}. {STATED_TERMS}"


def model_card(facts: Mapping[str, Any], scores: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return the model card: what the model is, how it was trained, how well it predicts, how to load it.

    The export adds what `loaders` says. Of the text it says what the manifest does.

    `scores` is the row of the validation table that belongs to the weights, `manifest` the corpus's. Nothing in the
    card depends on the time or the machine's speed, so equal trainings export equal folders.
    """
    hub_license, terms = terms_of(facts, manifest)
    prompt = json.dumps(manifest.get("prompt") or "The")
    shown = {f"{label}, validation": scores[name] for name, (label, _) in SCORES.items()}
    return f"""---
{metadata(hub_license, manifest, scores).to_yaml()}
---

# {NAME}

{table(["", ""], ["---", "---"], {"text": text_title(manifest), **facts, **shown}.items())}

A base model of research size: no instruction tuning, no safety training, no knowledge beyond its text.

**Scores.** Measured by the training itself when it ended, on the part of the text that is kept for validation, in
windows of the training's length that do not overlap. Whoever chose the parameters may have looked at this loss. The
score of the whole held-out text is measured later, from this folder: `results/evaluate/metrics.json` of the project
that trained it.

**Licence.** {escaped(terms)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)  # trust_remote_code=True: the code beside the weights
print(tokenizer.decode(model.generate(**tokenizer({prompt}, return_tensors="pt"), max_new_tokens=100)[0]))
```
"""


def loaders(config: Any) -> str:
    """Return the card's last paragraph: which code computes the model of `config`."""
    if others := other_variants(config):
        stated = ", ".join(f"`{name}` is `{value}`" for name, value in others.items())
        return f"""
Its router is not DeepSeek-V3's: {stated}. Only the code in this folder computes it, so load it with
`trust_remote_code=True`; transformers' own `DeepseekV3ForCausalLM` would give other logits.
"""
    return """
With transformers' own `DeepseekV3ForCausalLM` and with the code in this folder the logits are the same; the latter adds
multi-token prediction, the balancing state of the routers, and decoding on the latent cache.
"""


SCORES = {
    "loss": ("nats per token", "loss"),
    "perplexity": ("perplexity", "perplexity"),
    "nats_per_char": ("nats per character", "loss"),
}
"""Column of the validation table -> what it is called, and the Hub's type of metric."""


def text_title(manifest: Mapping[str, Any]) -> str:
    """Return what the card calls the text."""
    return manifest.get("title") or manifest["source"]


def metadata(hub_license: str, manifest: Mapping[str, Any], scores: Mapping[str, Any]) -> ModelCardData:
    """Return what stands at the head of the card; the scores as Hugging Face's model-index."""
    hub_id: str | None = manifest.get("origin", {}).get("hub_id")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_id or "text",
            dataset_name=text_title(manifest),
            dataset_split="validation",
            metric_type=metric_type,
            metric_name=label,
            metric_value=scores[name],
        )
        for name, (label, metric_type) in SCORES.items()
    ]
    return ModelCardData(
        license=hub_license,
        language=manifest.get("language"),
        datasets=[hub_id] if hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["deepseek_v3", "mixture-of-experts"],
        model_name=NAME,
        eval_results=results,
    )
