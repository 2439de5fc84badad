"""The program: which verbs there are, and how each of their endings becomes an exit code.

0: done. 1: something that the user can mend, told in one line. 2: wrong use. 130: Ctrl-C. A defect of ours
shows its traceback. A verb's module is imported when the verb is named, not before: `--help` stays quick.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import impasto
from impasto.cli.console import complain
from impasto.core.errors import UserError, nearest

#: verb -> where its function is, and its line in the list; a new verb is one file and one line
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("impasto.cli.demo:demo", "Teach the embedded miniature something new, and write a page that shows it."),
    "train": ("impasto.cli.train:train", "Fine-tune from a recipe."),
    "plan": ("impasto.cli.plan:plan", "Say what a run will take, before its first step."),
    "generate": ("impasto.cli.generate:generate", "Draw pictures from prompts, with adapters if you like."),
    "dataset": ("impasto.cli.dataset:dataset", "Look at pictures and captions before a run."),
    "import-recipe": ("impasto.cli.import_recipe:import_recipe",
                      "Turn another trainer's settings into a recipe, and say what could not be carried over."),
    "merge": ("impasto.cli.merge:merge", "Merge adapters into a checkpoint, or checkpoints with each other."),
    "mix": ("impasto.cli.mix:mix", "Add adapters up, exactly or at a lower rank."),
    "extract": ("impasto.cli.extract:extract", "Make an adapter of the difference between two checkpoints."),
    "resize": ("impasto.cli.resize:resize", "Bring an adapter to a lower rank, and say what is lost."),
    "convert": ("impasto.cli.convert:convert", "Write a file for another program, or an adapter as another kind."),
    "inspect": ("impasto.cli.inspect:inspect", "Say what a file is and what is in it, without running any of it."),
    "reproduce": ("impasto.cli.reproduce:reproduce", "The recipe that made a file, and what differs now."),
    "push": ("impasto.cli.push:push",
             "Share an adapter or a checkpoint on the Hugging Face hub, with its card and sample pictures."),
    "doctor": ("impasto.cli.doctor:doctor", "Look at this machine: devices, precision, packages, disk."),
}

SETTINGS = {"help_option_names": ["-h", "--help"]}


class Verb(TyperCommand):
    """A command whose failures become one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            complain(error, as_json=bool(ctx.params.get("as_json")))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise typer.Exit(130) from None


class Verbs(TyperGroup):
    """Verbs under a name; a wrong one is told with the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            ctx.fail(f"there is no verb {args[0]!r}; {nearest(args[0], known)}")
        return super().resolve_command(ctx, args)


class Program(Verbs):
    """The verbs of `VERBS`, each imported when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name][0].partition(":")
        verb = getattr(importlib.import_module(module), name)
        if isinstance(verb, typer.Typer):  # has verbs of its own
            return typer.main.get_command(verb)
        lone = typer.Typer(add_completion=False, rich_markup_mode=None)
        lone.command(cmd_name, cls=Verb, context_settings=SETTINGS)(verb)
        return typer.main.get_command(lone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])
        formatter.write_text("impasto VERB --help tells more of one.")


def build() -> Any:
    """The root command. Help is plain text: it is quick, and reads the same in a pipe and in any terminal."""
    root = typer.Typer(cls=Program, add_completion=False, rich_markup_mode=None, no_args_is_help=True,
                       context_settings=SETTINGS, subcommand_metavar="VERB [ARGUMENTS]...",
                       options_metavar="[OPTIONS]")

    @root.callback()
    def program(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                      help="The version, and nothing else.")] = False) -> None:
        """Fine-tune Stable Diffusion, and work with what a fine-tune leaves behind."""

    return typer.main.get_command(root)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, `sys.argv` by default, and exit.

    Arguments are taken as they are: on Windows too, since a prompt may hold `*`, `?` or `%`.
    """
    _wait_briefly()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises to install what nothing here would use
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a code page that lacks a character must not end a run
    with _broken_pipe_is_fine():
        build().main(sys.argv[1:] if arguments is None else list(arguments), prog_name="impasto")


def _wait_briefly() -> None:
    """Let torch's threads sleep soon where they wait, unless the user has said how they should; before torch is loaded.

    Spinning as long as they do by default, they make a small network a sixth quicker alone, and beside another busy
    program its seconds minutes: whoever waits holds the processor of whoever is waited for.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}  # others' OpenMP, and gcc's


@contextlib.contextmanager
def _broken_pipe_is_fine() -> Iterator[None]:
    """`impasto … | head` ends quietly, though nobody reads the rest."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        print(f"impasto {impasto.__version__}")
        raise typer.Exit
