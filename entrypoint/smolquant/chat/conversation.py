"""A conversation with a model: its chat template, its answers as they come, and how fast they came.

What a model writes is somebody else's text. Whoever takes it shows it without escapes, and without workflow
commands.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smolquant.errors import CheckpointError, InputError
from smolquant.text import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Message = dict[str, Any]
Write = Callable[[str], None]


@dataclass
class Reply:
    """What a model said, and how fast."""

    text: str
    tokens: int
    seconds: float
    """From the question to the last token."""
    tokens_per_second: float | None
    """Of all but the first token, which waits for the whole prompt; None for a single one."""
    cut: bool
    """Whether it might have gone on, and a limit on tokens ended it."""
    forgot: bool
    """Whether the beginning of the conversation had to be forgotten, to make room."""


@dataclass
class Chat:
    """A model to talk with, and what was said so far."""

    model: "PreTrainedModel"
    reader: Any
    """Its tokenizer, or its processor where it takes more than text."""
    max_tokens: int
    greedy: bool = False
    said: list[Message] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        """What reads and writes tokens."""
        return getattr(self.reader, "tokenizer", self.reader)

    @property
    def has_template(self) -> bool:
        """Whether the model knows questions from answers; if not, it goes on with a text."""
        return bool(getattr(self.reader, "chat_template", None))

    def ask(self, prompt: str, write: Write) -> Reply:
        """Have the model answer, or go on with ``prompt`` where it has no chat template.

        Args:
            write: takes the answer in pieces, as they come.

        Raises:
            CheckpointError: the model's chat template refuses the conversation.
            InputError: the prompt alone is longer than what the model reads.
        """
        import torch

        prompt = prompt.encode(errors="replace").decode()  # half a surrogate pair is no text
        self.said.append(self._message("user", prompt))
        before = len(self.said)
        ids, room = self._fitting(prompt)
        most = min(room, self.max_tokens)
        streamer = _streamer(self.tokenizer, write)
        options: dict[str, Any] = {"do_sample": False} if self.greedy else {}
        began = time.monotonic()
        with torch.inference_mode():
            whole = self.model.generate(
                **ids.to(self.model.device),
                max_new_tokens=most,
                streamer=streamer,
                **options,
            )
        seconds = time.monotonic() - began
        answer = whole[0][ids["input_ids"].shape[1] :]
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.said.append(self._message("assistant", text))
        return Reply(
            text,
            len(answer),
            seconds,
            streamer.tokens_per_second,
            cut=len(answer) >= most and int(answer[-1]) not in self._ends,
            forgot=len(self.said) <= before,
        )

    @property
    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _ids(self, prompt: str) -> Any:
        if not self.has_template:
            return self.tokenizer(prompt, return_tensors="pt")
        from jinja2 import TemplateError

        try:
            return self.reader.apply_chat_template(
                self.said,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except TemplateError as error:
            raise CheckpointError(
                f"The model's chat template refuses the conversation: {quoted(error)}.",
                hint="Ask in another way, or report it to whoever made the model.",
            ) from error

    def _message(self, role: str, text: str) -> Message:
        takes_parts = self.reader is not self.tokenizer
        return {"role": role, "content": [{"type": "text", "text": text}] if takes_parts else text}

    def _fitting(self, prompt: str) -> tuple[Any, int]:
        """The model's input, without the oldest messages where it is too long, and the room after it."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            ids = self._ids(prompt)
            tokens = ids["input_ids"].shape[1]
            room = self.max_tokens if most is None else most - tokens
            if room >= min(self.max_tokens, (most or 0) // 4):
                return ids, room
            if len(self.said) > 1:
                del self.said[:2]  # a question and its answer: templates want them in turn
            elif room > 0:
                return ids, room
            else:
                raise InputError(
                    f"The prompt has {tokens} tokens, and the model reads {most} with its answer.",
                    hint="Give a shorter prompt.",
                )


def converse(chat: Chat, prompts: Iterable[str], write: Write, remark: Write) -> None:
    """Answer one prompt after the other.

    Args:
        write: takes the answers in pieces, with an end of line after each.
        remark: is told a line on each answer.

    Raises:
        CheckpointError, InputError: see :meth:`Chat.ask`.
    """
    for prompt in prompts:
        if not prompt.strip():
            continue
        reply = chat.ask(prompt, write)
        write("\n")
        remark(told(reply))
        if not chat.has_template:
            chat.said.clear()


def told(reply: Reply) -> str:
    """The length and the speed of an answer, in a line."""
    speed = f", {reply.tokens_per_second:.1f} tokens a second" if reply.tokens_per_second else ""
    cut = "; not at its end, see --max-tokens" if reply.cut else ""
    forgot = "; the oldest messages are forgotten, to make room" if reply.forgot else ""
    return f"[{reply.tokens} tokens in {reply.seconds:.1f} s{speed}{cut}{forgot}]"


def typed_prompts(is_terminal: bool) -> Iterator[str]:
    """The lines that come on stdin, until its end."""
    if is_terminal:
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            return


def _streamer(tokenizer: Any, write: Write) -> Any:
    """transformers' streamer of whole words, which hands them to ``write`` and takes the time."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]  # transformers leaves it untyped
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        @property
        def tokens_per_second(self) -> float | None:
            if len(self.times) < 2 or self.times[-1] == self.times[0]:
                return None
            return (len(self.times) - 1) / (self.times[-1] - self.times[0])

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.monotonic())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer()
