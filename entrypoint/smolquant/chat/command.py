"""The command: from what was asked for to a conversation."""

import os
import sys

import click

from smolquant.errors import Cancelled
from smolquant.parameters import computing_on, of_published
from smolquant.report.console import Console
from smolquant.tokens import masked_token


@click.command(short_help="Try a variant in a terminal.")
@click.argument("repo_or_folder")
@click.argument("prompt", required=False)
@click.option("--variant", metavar="NAME", help="Variant to try. The default is told.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Length at which an answer is cut.",
)
@click.option(
    "--greedy",
    is_flag=True,
    help="Always take the likeliest token, whatever the model's generation_config.json asks for.",
)
@computing_on("Device that computes.")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Number of the CPU's threads."
)
@of_published
@click.pass_context
def chat(
    context: click.Context,
    /,
    repo_or_folder: str,
    prompt: str | None,
    variant: str | None,
    max_tokens: int,
    greedy: bool,
    device: str,
    threads: int | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
) -> int:
    """Try a published variant: answer PROMPT, or hold a conversation until the end of the input.

    The answer alone goes to stdout; what is told of it goes to stderr.
    """
    from smolquant.chat.place import Asked, opened
    from smolquant.hub import Hub

    console: Console = context.obj
    remarks = Console(os.environ, sys.stderr)
    token = masked_token(token, console.mask)
    hub = Hub(token, notify=remarks.info)
    asked = Asked(repo_or_folder, variant, device, revision, trust_remote_code)
    try:
        model, reader = opened(asked, hub, threads, remarks.info)
        from smolquant.chat.conversation import Chat, converse, typed_prompts

        talk = Chat(model, reader, max_tokens, greedy=greedy)
        if not talk.has_template:
            remarks.info(
                "The model has no chat template: it goes on with a text instead of answering."
            )
        in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if prompt is None and in_terminal:
            remarks.info("Ctrl-D ends the conversation.")
        prompts = typed_prompts(in_terminal) if prompt is None else [prompt]
        converse(talk, prompts, console.piece, remarks.info)
    except Cancelled as cancelled:  # Ctrl-C is how people leave
        console.piece("\n")
        return cancelled.exit_code
    return 0
