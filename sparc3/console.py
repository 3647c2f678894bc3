"""What the commands share: how they begin, end, print and show progress. Nothing heavy is imported before use."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import sparc3
from sparc3.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from sparc3.models import Loaded

# Windows of text that a model is judged on; the same in prune and evaluate, so that their figures agree.
EVALUATION_WINDOWS = 128
BUNDLED_TEXT, BUNDLED_HELD_OUT = "bundled", "bundled:held_out"
LENGTH = 128

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out, once the new is complete.")]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="SOURCE",
        help="Text: a .txt or .jsonl file, bundled, bundled:held_out, c4, wikitext2 or hf:NAME. Repeatable.",
    ),
]
Model = Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, tiny-llama or tiny-opt.")]
Length = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of text in a window, the BOS token not counted; 128, or fewer where the model has fewer "
        "positions (127 for the bundled ones).",
    ),
]
Device = Annotated[str, typer.Option(help="A torch device, as cpu or cuda:0.")]
Dtype = Annotated[str, typer.Option(help="float32 | bfloat16 | float16 | float64 | auto (the checkpoint's).")]

# (description=..., total=..., advance=...), as rich.progress.Progress.update
Update = Callable[..., None]


class Commands(typer.core.TyperGroup):
    """Wrong input ends in one line on stderr and exit code 2, Ctrl-C in 130; help fills the lines it has."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            # The lines of a docstring would be broken twice, where they end and where the terminal does.
            command.help = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            _complain(f"error: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            _complain("interrupted")
            raise typer.Exit(130) from error


def _complain(message: str) -> None:
    print("sparc3:", " ".join(message.split()), file=sys.stderr)


def begin() -> None:
    """To be called before a model is loaded: transformers' own bars and advice go, a wrong backend is refused.

    Raises:
        InputError: SPARC3_BACKEND names a backend that does not exist or cannot run here.
    """
    import transformers
    from sparc3_kernels.backend import unavailable

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    forced = os.environ.get("SPARC3_BACKEND")
    if forced and (reason := unavailable(forced)):
        raise InputError(f"SPARC3_BACKEND={forced} cannot run: {reason}")


@contextmanager
def progress(description: str) -> Iterator[Update]:
    """A progress bar with the time left on stderr, where that is a terminal; it pulses until it is given a total."""
    console = Console(stderr=True)
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield partial(bar.update, bar.add_task(description, total=None))


def show(*parts: RenderableType) -> None:
    """Print tables and lines on stdout; a file or a pipe gets 120 columns, and no line of text is broken."""
    terminal = Console(highlight=False, markup=False)
    console = terminal if terminal.is_terminal else Console(highlight=False, markup=False, width=120)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def show_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    from sparc3.report import as_json

    print(as_json(value))


def check_apart(model: str, out: Path) -> None:
    """InputError where writing ``out`` would replace the model that is read."""
    source = Path(model).expanduser().resolve()
    if source.exists() and out.resolve() in (source, *source.parents):
        raise InputError(f"{out} is where the model is read from; give another --out")


def check_new_file(path: Path, force: bool) -> None:
    """InputError where a file cannot be put at ``path``; to be called before long work."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file as --out")
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another --out, or --force to replace it")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def short(settings: Any) -> str:
    """A setting in a table's cell: text as it is, anything else as JSON."""
    return settings if isinstance(settings, str) else json.dumps(settings)


def words(text: str | None) -> list[str]:
    """The words of an option that takes several, joined by commas."""
    return [word.strip() for word in text.split(",")] if text else []


def saved(out: Path) -> str:
    """The line that ends a command: the folder, and the files in it."""
    return f"Saved {out}: {', '.join(sorted(file.name for file in out.iterdir()))}"


def documents_of(text: list[str], model: str, option: str = "--text") -> list[str]:
    """The documents of the sources; InputError where none is given, or the model that lacks them is nowhere."""
    from sparc3.models import check_there

    if not text:
        check_there(model)
        raise InputError(
            f"{model} is not a bundled model, so it has no text of its own: give {option} FILE, c4, wikitext2, "
            "hf:NAME or bundled"
        )
    return sparc3.read_documents(text)


def window_length(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, length: int | None) -> int:
    """Tokens of text in a window: as asked for, else what the model has positions for, at most 128."""
    if length is not None:
        return length
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return LENGTH
    return min(LENGTH, positions - (tokenizer.bos_token_id is not None))


def duration(seconds: float) -> str:
    """Seconds in words, as 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def notes(loaded: Loaded) -> list[str]:
    """What is to be said beside the figures of a model."""
    return [f"Note: the model is {loaded.note}"] if loaded.note else []
