"""`trimtab chat`: talk with a tuned model."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def chat(
    folder: Annotated[Path, typer.Argument(help="The folder that train wrote.")],
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is drawn at a temperature.")] = 0,
) -> None:
    """Talk with a model that was tuned on chats or instructions: a line, an answer.

    /new forgets what was said; an empty line, or the end of the input, ends the talk.
    """
    from .quiet import quiet

    quiet()
    import transformers

    from .. import run
    from ..errors import ConfigError
    from ..tasks.text_generation import TextGeneration

    found = run.load(folder)
    task = found.task
    if not isinstance(task, TextGeneration) or "text" in task.names:
        raise ConfigError(f"{folder} was not trained on chats or instructions. Try: trimtab predict {folder} TEXT")
    transformers.set_seed(seed)
    settings = {"do_sample": True, "temperature": temperature} if temperature else {}
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while line := _line():
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        while len(task.prompt(messages)) > task.max_length and len(messages) > len(start) + 1:
            del messages[len(start) : len(start) + 2]  # what was said first, and its answer
        streamer = transformers.TextStreamer(task.reader, skip_prompt=True, skip_special_tokens=True)
        answer = task.reply(found.model, messages, streamer=streamer, max_new_tokens=max_new_tokens, **settings)
        messages.append({"role": "assistant", "content": answer})


def _line() -> str:
    from ..errors import DataError

    try:
        return (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise DataError(f"What was typed, or piped in, is not UTF-8: {error.reason}.") from None
