"""How the command's parameters are declared: from argv, an action's inputs, and the settings' defaults.

An action's inputs arrive as ``INPUT_<NAME>`` with the hyphens kept; an empty one means unset.
"""

import os
import shlex
from collections.abc import Callable
from typing import Any

import click

from smolquant.settings import default_of


def input_variable(name: str) -> str:
    """The environment variable in which a Docker action finds its input ``name``."""
    return f"INPUT_{name.replace(' ', '_').upper()}"


class _FromEnvironment(click.Parameter):
    """A parameter whose variables count without the white space around them; blank means unset."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        names = [self.envvar] if isinstance(self.envvar, str) else self.envvar or ()
        texts = (os.environ.get(name, "").strip() for name in names)
        return next(filter(None, texts), None)


class InputArgument(_FromEnvironment, click.Argument):
    """An argument that an action's input sets too."""


class InputOption(_FromEnvironment, click.Option):
    """An option that has its default from the settings, and can be written into a command again."""

    def __init__(
        self, *arguments: Any, written: Callable[[Any], str | None] = str, **attributes: Any
    ) -> None:
        """``written`` gives a value's text in the command that reproduces the run; None leaves it out."""
        super().__init__(*arguments, **attributes)
        self._written = written

    def words(self, value: Any) -> list[str]:
        """The words that give ``value`` on a command line; none for the default."""
        if value in (self.default, ()):
            return []
        values = value if self.multiple else (value,)
        shown = [text for one in values if (text := self._written(one)) is not None]
        if self.is_flag:
            return [self.opts[0]] * len(shown)
        return [word for text in shown for word in (self.opts[0], text)]


def option(name: str, *, env: tuple[str, ...] = (), **attributes: Any) -> Callable[..., Any]:
    """An option that an action's input of the same name sets too, unless ``env`` names others."""
    return click.option(
        f"--{name}",
        cls=InputOption,
        envvar=env or input_variable(name),
        default=default_of(name.replace("-", "_")),
        show_default=True,
        **attributes,
    )


def switch(name: str, help_text: str, **attributes: Any) -> Callable[..., Any]:
    """An option that is off unless it is named; as an input, ``true`` or ``false``."""
    return option(name, is_flag=True, help=help_text, **attributes)


def hub_token(help_text: str) -> Callable[..., Any]:
    """The token of a command that takes no inputs of an action."""
    return click.option("--token", cls=InputOption, envvar="HF_TOKEN", help=help_text)


def of_published(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that reads published variants: where they are, and how far to trust them."""
    for one in reversed(
        (
            click.option("--revision", help="Branch, tag or sha on the Hub."),
            hub_token("Hugging Face token, for a private repository."),
            click.option(
                "--trust-remote-code",
                is_flag=True,
                help="Run the model code that the repository contains; read it first.",
            ),
        )
    ):
        command = one(command)
    return command


def computing_on(help_text: str) -> Callable[..., Any]:
    """The device of a command that takes no inputs of an action."""
    devices = click.Choice(["auto", "cpu", "cuda"])
    return click.option("--device", type=devices, default="auto", show_default=True, help=help_text)


def never_written(_: object) -> None:
    """Give no text, for an option that the reproducing command leaves out."""


def without_query(address: str) -> str:
    """An address without its query, which may hold a token."""
    return address.partition("?")[0]


class Patterns(click.ParamType[str]):
    """A repeatable option; as an input, one pattern a line (a pattern may hold spaces)."""

    name = "pattern"

    def split_envvar_value(self, rv: str) -> list[str]:
        return [line.strip() for line in rv.splitlines() if line.strip()]


def reproduce(context: click.Context) -> str:
    """The shell command that makes this run again; a token stays in the environment."""
    words = ["smolquant", "quantize"]
    named = (context.params["model_path"], context.params["repo_name"])
    words += dict.fromkeys(name for name in named if name)  # one name is enough for both
    for parameter in context.command.params:
        if isinstance(parameter, InputOption):
            words += parameter.words(context.params[str(parameter.name)])
    return shlex.join(words)
