"""Let an exported model write on the terminal: `python -m dsv3.write outputs/final_model --prompt "ROMEO:"`.

The text appears token by token. What is not stated is that of section `sample` of params.yaml, so that a prompt of the
sample stage with its seed gives the stage's text. Standard output has the continuations alone, everything else goes to
standard error: `--interactive` reads a prompt per line, from a pipe as well.
"""

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from dsv3.cli import ParamsOption, command
from dsv3.errors import UserError
from dsv3.params.read import Params, read_params
from dsv3.params.section import error_line

if TYPE_CHECKING:  # torch is slow to import, and --help needs none
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
"""A conversation: role and content of each turn."""


def chosen(params: Params, greedy: bool, options: dict[str, Any]) -> Params:
    """Return the parameters with the `options` that are stated; `UserError`, with the option's name, for a wrong one.

    Whoever states an option of sampling wants to sample, whatever params.yaml says.
    """
    stated = {name: value for name, value in options.items() if value is not None}
    of_sampling = [name for name in ("temperature", "top_p", "top_k") if name in stated]
    if greedy and of_sampling:
        raise UserError(f"--{of_sampling[0].replace('_', '-')} has no effect with --greedy; leave one of them out")
    do_sample = not greedy and (params.sample.do_sample or bool(of_sampling))
    values = {**params.model_dump(), "seed": stated.pop("seed", params.seed)}
    values["sample"] |= {"num_return_sequences": 1, "speculative": False, "do_sample": do_sample, **stated}
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        name, _, rest = error_line(error.errors()[0]).removeprefix("sample.").partition(" ")
        raise UserError(f"--{name.replace('_', '-')} {rest}") from None


def all_prompts(prompt: str | None, interactive: bool) -> Iterator[str]:
    """Yield the prompt, then the lines of standard input that are not empty, if `interactive`."""
    if prompt is not None:
        yield checked(prompt, "--prompt")
    while interactive:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise UserError("standard input: is not UTF-8; convert it") from None
        if not line:
            return
        if text := line.rstrip("\r\n"):
            yield checked(text, "standard input")


def checked(text: str, where: str) -> str:
    """Return `text`; raise `UserError` where Python has kept bytes in it that are no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: is not UTF-8; convert it") from None
    return text


def check_fits(ids: list[int], max_new_tokens: int, model: "PreTrainedModel") -> None:
    """Raise `UserError` if the model has too few positions for a prompt and what follows."""
    limit = model.config.max_position_embeddings
    if len(ids) >= limit:
        raise UserError(f"the prompt has {len(ids)} tokens; must be < {limit}, the model's positions; shorten it")
    if max_new_tokens > limit - len(ids):
        raise UserError(
            f"--max-new-tokens is {max_new_tokens}; must be <= {limit - len(ids)}, which a prompt of {len(ids)} "
            f"tokens leaves of the model's {limit} positions"
        )


def chat_tokens(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> list[int]:
    """Return the ids of a conversation in the tokenizer's chat template, up to where the model's turn begins."""
    try:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # the template is a program: its errors are of any type
        raise UserError(f"--chat: the chat template can't be applied ({error}); leave --chat out") from None
    return ids


def main(  # noqa: PLR0913 (an option each)
    model: Annotated[Path, typer.Argument(help="The exported model, as in outputs/final_model.")],
    prompt: Annotated[str | None, typer.Option(help="The beginning of the text.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Read prompts from standard input.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of a continuation.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the most probable token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Below 1 sharpens, above 1 flattens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set whose probabilities sum to p.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens; 0: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first prompt; the next one's is one more.")] = None,
    params: ParamsOption = Path("params.yaml"),
) -> None:
    """Continue prompts with an exported model; what is not stated is that of section `sample` of params.yaml."""
    if prompt is None and not interactive:
        raise UserError("--prompt is missing; state one, or --interactive to type prompts")
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    parameters = chosen(read_params(params), greedy, {**options, "seed": seed})

    from dsv3.devices import torch_device
    from dsv3.export.loading import load_model, load_tokenizer
    from dsv3.generation.sampling import prompt_tokens
    from dsv3.generation.streaming import stream

    with redirect_stdout(sys.stderr):
        loaded, tokenizer = load_model(model, torch_device(parameters.runtime)), load_tokenizer(model)
    if chat and not tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer in {model} has no chat template; leave --chat out")
    can_speculate = not parameters.sample.do_sample and loaded.config.num_nextn_predict_layers > 0
    settings = parameters.sample.model_copy(update={"speculative": can_speculate})
    messages: Messages = []
    for number, text in enumerate(all_prompts(prompt, interactive)):
        messages.append({"role": "user", "content": text})
        ids = chat_tokens(tokenizer, messages) if chat else prompt_tokens(tokenizer, text)
        check_fits(ids, settings.max_new_tokens, loaded)
        answer, drafts = stream(
            loaded, tokenizer, ids, settings, parameters.seed + number, lambda part: typer.echo(part, nl=False)
        )
        messages.append({"role": "assistant", "content": answer})
        typer.echo()
        if drafts is not None:
            typer.echo(str(drafts), err=True)


if __name__ == "__main__":
    command(main)
