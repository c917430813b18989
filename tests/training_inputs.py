"""Small inputs for tests of training: an architecture, token data and parameters, made in a second."""

import atexit
import json
import os
import random
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsv3.artifacts import sha256_file, sha256_lines
from dsv3.data.shards import write_shards
from tests.committed import PROJECT
from tests.warm_python import EXECUTABLE, TRAINING, WarmPython

ROOT = Path(__file__).parent.parent
WORDS = ["the", "king", "is", "dead", "long", "live", "lord", "queen", "of", "night", "what", "light", "breaks"]

MICRO = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_interleave": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
"""Overlay of `MICRO` with matrices of at least one FP8 block."""

TRAIN = {
    "max_steps": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
    "block_size": 32,
    "eval_steps": 5,
    "learning_rate": 0.01,
    "precision": "fp32",
}
RUNTIME = {"device": "cpu", "logging_steps": 2, "save_steps": 5, "trackers": []}


def write_inputs(folder: Path, seed: int = 0, **sections: dict) -> Path:
    """Write everything that the train stage reads into `folder`; return the path of its params.yaml.

    `sections` overlay params.yaml: `train={"max_steps": 3}`; `architecture` overlays the micro architecture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MICRO, **sections.pop("architecture", {})}))
    write_tokens(folder / "tokens", seed)
    write_json(folder / "corpus" / "manifest.json", {"source": "made up", "sha256": "0" * 64})
    (folder / "accepted.txt").write_text("accepted\n")
    yaml = YAML()
    params = yaml.load((PROJECT / "params.yaml").read_text())
    params["model"]["config"] = str(folder / "config.json")
    params["tokenize"]["vocab_size"] = 257
    params["evaluate"].update(block_size=32, stride=16)
    params["sample"].update(max_new_tokens=12)
    max_steps = sections.get("train", {}).get("max_steps", TRAIN["max_steps"])
    shortened = {"eval_steps": min(TRAIN["eval_steps"], max_steps)} if max_steps > 0 else {}
    for section, values in {"train": TRAIN | shortened, "runtime": RUNTIME}.items():
        params[section].update({**values, **sections.pop(section, {})})
    for section, values in sections.items():
        params[section].update(values)
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    return folder / "params.yaml"


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_tokens(folder: Path, seed: int) -> None:
    """Write token data of a made-up text, a byte a token, as the tokenize stage would."""
    byte_names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{name: index + 1 for index, name in enumerate(byte_names)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    fast.save_pretrained(folder / "tokenizer")
    generator, splits = random.Random(seed), {}
    for split, num_words in {"train": 2000, "validation": 100, "test": 100}.items():
        text = " ".join(generator.choice(WORDS) for _ in range(num_words))
        tokens = np.array([0, *fast.encode(text)], np.uint16)
        paths = write_shards(folder, split, [tokens], np.dtype("<u2"), 10**6)
        splits[split] = {
            "tokens": len(tokens),
            "characters": len(text),
            "bytes": len(text),
            "documents": 1,
            "shards": {path.name: sha256_file(path) for path in paths},
        }
    meta = {
        "vocab_size": len(vocabulary),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "uint16",
        "tokenizer_sha256": sha256_file(folder / "tokenizer" / "tokenizer.json"),
        "sha256": sha256_lines({name: digest for split in splits.values() for name, digest in split["shards"].items()}),
        "corpus": {"source": "made up", "sha256": "0" * 64},
        "splits": splits,
    }
    write_json(folder / "meta.json", meta)


def stage_command(folder: Path, *options: str) -> list[str]:
    """Return the command line of the train stage on what `write_inputs` wrote into `folder`."""
    paths = {
        "tokens": "tokens",
        "corpus": "corpus",
        "sizes": "accepted.txt",
        "model": "final_model",
        "results": "results",
        "params": "params.yaml",
    }
    arguments = [word for option, path in paths.items() for word in (f"--{option}", str(folder / path))]
    return [sys.executable, "-m", "stages.train", *arguments, *options]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a stage whose checkpoints lie in `folder`, with one thread for equal rounding."""
    return {**os.environ, "DVC_ROOT": str(folder), "OMP_NUM_THREADS": "1"}


@cache
def warm_python() -> str:
    """Return the Python of this process's tests that has loaded what the train stage loads of others."""
    folder = tempfile.TemporaryDirectory(prefix="dsv3-warm-")
    warm = WarmPython(Path(folder.name), {**os.environ, "OMP_NUM_THREADS": "1"}, TRAINING)
    atexit.register(folder.cleanup)
    atexit.register(warm.close)
    return str(warm.programs / "python")


def run_python(folder: Path, *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, from the project's root, in the environment of `folder`; what it starts is warm too."""
    return subprocess.run(
        [warm_python(), *arguments],
        cwd=ROOT,
        env={**environment(folder), EXECUTABLE: warm_python()},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def run_stage(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the train stage to its end."""
    return run_python(folder, *stage_command(folder, *options)[1:])


def trained_folder(folder: Path, **sections: dict) -> Path:
    """Write the inputs into `folder`, run the train stage, which must end well, and return `folder`."""
    write_inputs(folder, **sections)
    done = run_stage(folder)
    assert done.returncode == 0, done.stderr
    return folder


def started_run(folder: Path, **sections: dict) -> Any:
    """Return a training at step 0 in this process, as the stage would start it."""
    from accelerate.state import AcceleratorState

    from dsv3.training.interruption import Interruption
    from dsv3.training.setup import prepare_model, prepare_run, start_accelerator

    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision, unless told to forget it
    plan = plan_of(folder, **sections)
    accelerator = start_accelerator(plan)
    model, _ = prepare_model(plan, accelerator.device)
    return prepare_run(plan, accelerator, model, Interruption())


def no_save(run: Any) -> None:
    raise AssertionError(f"nothing is to be saved at step {run.state.step}")


def history(run: Any) -> list[dict[str, Any]]:
    """Train to the end; return the sums of each step."""
    from dsv3.training.loop import Hook, train

    rows: list[dict[str, Any]] = []
    seen = {"loss": 0.0, "grad_norm": 0.0}

    def remember(run: Any) -> None:
        sums = run.state.step_sums.sums
        rows.append({name: sums[name] - seen[name] for name in seen})
        seen.update({name: sums[name] for name in seen})

    train(run, [Hook(1, remember)], no_save)
    return rows


def plan_of(folder: Path, **sections: dict) -> Any:
    """Write the inputs into `folder` and return the plan that the stage makes of them."""
    from dsv3.params.read import read_params
    from dsv3.training.plan import read_training_plan

    return read_training_plan(read_params(write_inputs(folder, **sections)), folder / "tokens")
