"""What the commands write: the model's text to stdout, all else to stderr."""

from __future__ import annotations

import logging
import sys

from rich.console import Console


def write(text: str) -> None:
    """Writes the model's text as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_prompt(text: str) -> None:
    """Writes what the user gave, dimmed on a terminal, so that the model's text stands out."""
    Console().print(text, style="dim", end="", markup=False, highlight=False, emoji=False, soft_wrap=True)
    sys.stdout.flush()


def stderr() -> Console:
    """A console on what is stderr now."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A line about the work, not part of the output."""
    stderr().print(text, style="dim", markup=False, soft_wrap=True)


def show_error(message: str) -> None:
    """An error as a plain line."""
    console = stderr()
    console.print("error: ", style="bold red", end="")
    console.print(message, markup=False, soft_wrap=True)


def set_up_logging(verbose: bool) -> None:
    """The engine's log lines go to stderr: all of them if `verbose`, else warnings."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("nanovllm_jax").setLevel(logging.INFO if verbose else logging.WARNING)
