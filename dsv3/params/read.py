"""params.yaml, validated whole.

Every stage reads the whole file through `read_params` in its first second, so that a mistake in the last stage's
section is reported before the first stage starts. Each section has a module; this one only puts them together and
checks the relations between them. It alters no value (no class has a default), which is
why a change here re-runs no stage.
"""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from dsv3.errors import UserError, one_line
from dsv3.params.architecture import Architecture, read_architecture
from dsv3.params.data import DataParams
from dsv3.params.estimate_size import EstimateSizeParams
from dsv3.params.evaluate import EvaluateParams
from dsv3.params.model import ModelParams
from dsv3.params.runtime import RuntimeParams
from dsv3.params.sample import SampleParams
from dsv3.params.section import Section, error_line
from dsv3.params.text import read_small_text
from dsv3.params.tokenize import TokenizeParams
from dsv3.params.train import TrainParams

MAX_ENTRIES = 5_000
"""Forty times what params.yaml holds."""
MAX_VALUES = 100_000
MAX_DEPTH = 50


class Params(Section):
    """The whole of params.yaml."""

    seed: int = Field(ge=0, lt=2**63)
    """Every random stream of every stage is derived from it."""

    model: ModelParams
    data: DataParams
    tokenize: TokenizeParams
    estimate_size: EstimateSizeParams
    train: TrainParams
    evaluate: EvaluateParams
    sample: SampleParams
    runtime: RuntimeParams


def read_params(path: Path) -> Params:
    """Return the validated parameters at `path`; raise `UserError` in one line for the first thing that is wrong."""
    return validated(read_yaml(path), path)


def read_yaml(path: Path) -> Any:
    """Return the values in `path` as DVC reads them; raise `UserError` in one line for a file that is none."""
    try:
        text = read_small_text(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    _check_text(text, path)
    try:
        values = YAML(typ="safe").load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not YAML ({one_line(error.problem)})") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML that can be read (it is nested too deeply)") from None
    except Exception as error:  # what the types of YAML raise for a wrong date, number or tag
        raise UserError(f"{path}: not YAML that can be read ({one_line(error)})") from None
    _check_size(values, path)
    return values


def _check_text(text: str, path: Path) -> None:
    """Raise `UserError` for a text that YAML's parser, which takes 0.3 ms a value, would be busy with for long."""
    if (entries := text.count("\n") + text.count(",")) > MAX_ENTRIES:
        raise UserError(f"{path}: has {entries:,} lines and commas; must have <= {MAX_ENTRIES:,}")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise UserError(f"{path}: opens {depth} brackets; must be nested <= {MAX_DEPTH} deep")


def _check_size(values: Any, path: Path) -> None:
    """Raise `UserError` where aliases make a small file stand for too many values, or for itself."""
    left, number = [values], 0
    while left:
        value = left.pop()
        number += 1
        if number > MAX_VALUES:
            raise UserError(f"{path}: stands for more than {MAX_VALUES:,} values; write values, not aliases of aliases")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{path}: {value!r:.60} holds half of a surrogate pair; write the whole character")
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value


def validated(values: Any, path: Path) -> Params:
    """Return `values` as parameters; raise `UserError` in one line, with `path` in it, for the first thing wrong."""
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(_line_with_suggestion(_first_cause(error.errors())))}") from None
    _check_relations(params, read_architecture(Path(params.model.config)), path)
    return params


def _first_cause(errors: list[ErrorDetails]) -> ErrorDetails:
    """Return the error to report: a misspelt key rather than the missing one that it causes."""
    return next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])


def _line_with_suggestion(error: ErrorDetails) -> str:
    """Return a pydantic error as one line; for an unknown key, with the parameter that may have been meant."""
    line = error_line(error)
    return line + _suggestion(error["loc"]) if error["type"] == "extra_forbidden" else line


def _suggestion(location: tuple[int | str, ...]) -> str:
    """Return `; did you mean …?` for the closest known key of the section, or nothing."""
    section: Any = Params
    for part in location[:-1]:
        section = section.model_fields[str(part)].annotation
    close = get_close_matches(str(location[-1]), section.model_fields, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(section.model_fields)}"


def _check_relations(params: Params, architecture: Architecture, path: Path) -> None:
    """Raise `UserError` where two sections, or a section and the architecture, contradict each other."""
    limit, vocabulary = architecture.max_position_embeddings, architecture.vocab_size
    train, evaluate, tokenize = params.train, params.evaluate, params.tokenize
    config = params.model.config
    trains_tokenizer = tokenize.tokenizer == "byte_level_bpe"
    rules = [
        (
            trains_tokenizer and tokenize.vocab_size > vocabulary,
            f"tokenize.vocab_size is {tokenize.vocab_size}; must be <= {vocabulary}, the vocab_size of {config}",
        ),
        (
            train.block_size > limit,
            f"train.block_size is {train.block_size}; must be <= {limit}, the max_position_embeddings of {config}",
        ),
        (
            architecture.num_nextn_predict_layers >= train.block_size,
            f"train.block_size is {train.block_size}; must be > {architecture.num_nextn_predict_layers}, the "
            f"num_nextn_predict_layers of {config}, each of which looks a token further on",
        ),
        (
            evaluate.block_size > limit,
            f"evaluate.block_size is {evaluate.block_size}; must be <= {limit}, "
            f"the max_position_embeddings of {config}",
        ),
        (
            evaluate.stride > evaluate.block_size,
            f"evaluate.stride is {evaluate.stride}; must be <= {evaluate.block_size}, evaluate.block_size, "
            "or tokens are skipped",
        ),
        (
            tokenize.validation_fraction + tokenize.test_fraction >= 1,
            "tokenize.validation_fraction + tokenize.test_fraction must be < 1",
        ),
        *_process_rules(params),
        *_sample_rules(params, architecture),
    ]
    for is_broken, message in rules:
        if is_broken:
            raise UserError(f"{path}: {message}")


def _process_rules(params: Params) -> list[tuple[bool, str]]:
    """Return what the batch allows `runtime.num_processes`: whether each rule is broken, and its message."""
    train, processes = params.train, params.runtime.num_processes
    accumulation = train.gradient_accumulation_steps
    smallest = accumulation // train.batch_ramp_levels
    return [
        (
            accumulation % processes != 0,
            f"runtime.num_processes is {processes}; must divide train.gradient_accumulation_steps ({accumulation}), "
            "so that the batch stays the same",
        ),
        (
            smallest % processes != 0,
            f"runtime.num_processes is {processes}; must divide {smallest}, the forward passes of the first step: "
            f"train.gradient_accumulation_steps ({accumulation}) / train.batch_ramp_levels ({train.batch_ramp_levels})",
        ),
    ]


def _sample_rules(params: Params, architecture: Architecture) -> list[tuple[bool, str]]:
    """Return what the architecture allows `sample`: whether each rule is broken, and its message."""
    sample, config, limit = params.sample, params.model.config, architecture.max_position_embeddings
    return [
        (
            sample.max_new_tokens >= limit,
            f"sample.max_new_tokens is {sample.max_new_tokens}; must be < {limit}, the max_position_embeddings "
            f"of {config}, which prompts share",
        ),
        (
            sample.speculative and architecture.num_nextn_predict_layers == 0,
            "sample.speculative is true; needs a model with MTP modules, and num_nextn_predict_layers of "
            f"{config} is 0; set it to 1, or sample.speculative to false",
        ),
    ]


def schema_text() -> str:
    """Return the JSON schema of params.yaml, for editors."""
    return json.dumps(Params.model_json_schema(), indent=2) + "\n"
