"""Self-study: the model itself asks about pieces of a document, and answers with the document in its context."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..adapters.lookup import base_of
from ..probing.modules import execution_device
from ..probing.recording import evaluating
from .conversations import Conversation, ConversationFile, batches
from .document import Chat, Window
from .padding import padding_id
from .teacher import Contexts, adapters_off


@dataclass(frozen=True)
class Template:
    """
    How to make conversations of one kind.

    `{piece}` stands for a piece of the document, `{start}` for the piece's first words.

    Attributes:
        kind (`str`): A name, which is stored with the conversations.
        prompt (`str`): The prompt, or, if `asks`, the request to which the model writes the prompt.
        asks (`bool`): Whether the model writes the prompt. It sees the piece in the request alone.
        recites (`bool`): Whether the answer is the piece after its first words, instead of what the model writes.

    Example:

    ```py
    >>> from peft_prefix_plus import Template

    >>> template = Template("quotation", 'What comes after "{start}"?', recites=True)
    >>> template.fill("The ferry leaves Saltry at nine in the morning, and comes back at noon.")
    'What comes after "The ferry leaves Saltry at nine in the"?'

    ```
    """

    kind: str
    prompt: str
    asks: bool = False
    recites: bool = False

    def __post_init__(self) -> None:
        for name, expected in (("kind", str), ("prompt", str), ("asks", bool), ("recites", bool)):
            if not isinstance(getattr(self, name), expected):
                raise TypeError(f"`{name}` of a template must be a {expected.__name__}, got {getattr(self, name)!r}.")
        if "{piece}" not in self.prompt and "{start}" not in self.prompt:
            raise ValueError(f"`prompt` of a template must have {{piece}} or {{start}} in it, got {self.prompt!r}.")
        if self.asks and self.recites:
            raise ValueError(
                f"The template {self.kind!r} both asks and recites; a piece answers no prompt that the model writes."
            )

    def fill(self, piece: str) -> str:
        """Return the prompt for a piece."""
        return self.prompt.replace("{piece}", piece).replace("{start}", first_words(piece))


QUESTION = Template(
    "question", "{piece}\n\nWrite one question that this passage answers. Write the question only.", asks=True
)
DETAIL = Template(
    "detail",
    "{piece}\n\nWrite one question about a name, a number or a date in this passage. Name what it is about. "
    "Write the question only.",
    asks=True,
)
USE = Template(
    "use",
    "{piece}\n\nSomebody needs this passage for a task. Write in one sentence what they ask an assistant to do. "
    "Write the request only.",
    asks=True,
)
SUMMARY = Template("summary", 'What does the passage say that begins with "{start}"? Summarize it.')
CONTINUATION = Template("continuation", 'Go on from these words of the text: "{start}"', recites=True)
QUOTATION = Template("quotation", 'What does the text say after "{start}"?', recites=True)

TEMPLATES = (QUESTION, CONTINUATION, SUMMARY, QUOTATION, DETAIL, CONTINUATION, USE, QUOTATION)
"""
The templates that are used unless the user gives others, in turn. Half of the answers are the document's own words: they cost no
writing, and a small model's own answers hold few of its facts.
"""

WORDS_OF_START = 8


def first_words(piece: str) -> str:
    """Return the first words of a piece."""
    return " ".join(piece.split()[:WORDS_OF_START])


@dataclass(frozen=True)
class SelfStudy:
    """
    How many conversations self-study makes, and how.

    Args:
        num_conversations (`int`, defaults to 512): How many.
        templates (`Sequence[Template]`): The templates that they are made from.
        piece_tokens (`int`, defaults to 160): The tokens of a piece; each has at least half as many.
        max_prompt_tokens (`int`, defaults to 48): The most tokens of a prompt that the model writes.
        max_answer_tokens (`int`, defaults to 128): The most tokens of an answer.
        temperature (`float`, defaults to 0.7): The sampling temperature; 0 takes the likeliest token.
        batch_size (`int`, defaults to 8): The conversations that are written at a time.
        seed (`int`, defaults to 0): The random seed of pieces and tokens.

    Raises:
        ValueError: If a number is out of its range, or there is no template.
    """

    num_conversations: int = 512
    templates: Sequence[Template] = TEMPLATES
    piece_tokens: int = 160
    max_prompt_tokens: int = 48
    max_answer_tokens: int = 128
    temperature: float = 0.7
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_conversations", 1),
            ("piece_tokens", 16),
            ("max_prompt_tokens", 4),
            ("max_answer_tokens", 1),
            ("batch_size", 1),
            ("temperature", 0),
            ("seed", 0),
        ):
            if not getattr(self, name) >= least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not self.templates:
            raise ValueError("`templates` is empty: self-study needs at least one.")


@dataclass(frozen=True)
class Piece:
    """A piece of a window's text."""

    window: int
    text: str


class Writer:
    """
    The base model as a writer of prompts and answers.

    Args:
        model: The model; its adapters are off.
        chat (`Chat`): The tokenizer's chat.
        windows (`Sequence[Window]`): The document's windows.
        temperature (`float`): See [`SelfStudy`].
    """

    def __init__(self, model: Any, chat: Chat, windows: Sequence[Window], temperature: float) -> None:
        self.model = model
        self.base: Any = base_of(model)
        self.chat = chat
        self.contexts = Contexts([window.token_ids for window in windows])
        self.windows = windows
        self.sampling = (
            dict(do_sample=True, temperature=temperature, top_k=0) if temperature > 0 else dict(do_sample=False)
        )

    def prompts(self, requests: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return what the model writes to requests, without the document."""
        written = self._write([self.chat.prompt(request) for request in requests], max_new_tokens, None)
        return [self.chat.text(token_ids).strip(' \n"') for token_ids in written]

    def answers(self, prompts: Sequence[str], windows: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """Return the tokens that the model writes to prompts, each with a window of the document in its context."""
        found: dict[int, list[int]] = {}
        for window in dict.fromkeys(windows):
            members = [i for i, each in enumerate(windows) if each == window]
            token_ids = [self.chat.prompt(prompts[i], self.windows[window]) for i in members]
            found.update(zip(members, self._write(token_ids, max_new_tokens, window), strict=True))
        return [found[i] for i in range(len(prompts))]

    def likeliest_window(self, prompt: str, answer: Sequence[int] = ()) -> int:
        """Return the window that a prompt is about: with it in the context, the model finds prompt and answer likeliest."""
        if len(self.windows) == 1:
            return 0
        self.contexts.read(self.model, self.model)
        losses = [self._loss(window, prompt, answer) for window in range(len(self.windows))]
        return losses.index(min(losses))

    @torch.no_grad()
    def _loss(self, window: int, prompt: str, answer: Sequence[int]) -> float:
        """
        Return the summed loss, after a window, of the tokens that a prompt and its answer have with and without it. The
        first token after the window does not count.
        """
        alone = [*self.chat.prompt(prompt), *answer]
        after = [*self.chat.prompt(prompt, self.windows[window])[len(self.windows[window].token_ids) :], *answer]
        ids = torch.tensor([after], device=execution_device(self.base))
        with evaluating(self.model), adapters_off(self.model):
            logits = self.base(
                input_ids=ids,
                attention_mask=self.contexts.mask(window, torch.ones_like(ids)),
                past_key_values=self.contexts.cache(window, 1),
            ).logits[0, :-1]
        count = min(_common_end(alone, after), len(logits))
        return cross_entropy(logits[-count:].float(), ids[0, -count:], reduction="sum").item()

    def _write(self, prompts: Sequence[list[int]], max_new_tokens: int, window: int | None) -> list[list[int]]:
        """Complete prompts of token ids, which begin with a window's if there is one; the padding stands after these."""
        padding, device = padding_id(self.chat.tokenizer), execution_device(self.base)
        start = 0 if window is None else len(self.windows[window].token_ids)
        length = max(map(len, prompts))
        rows = [[*ids[:start], *[padding] * (length - len(ids)), *ids[start:]] for ids in prompts]
        mask = [[*[1] * start, *[0] * (length - len(ids)), *[1] * (len(ids) - start)] for ids in prompts]
        more: dict[str, Any] = {}
        if window is not None:
            self.contexts.read(self.model, self.model)
            more["past_key_values"] = self.contexts.cache(window, len(prompts))
        ends = self.chat.end_ids()
        with evaluating(self.model), adapters_off(self.model):
            output = self.base.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                eos_token_id=ends or None,
                **self.sampling,
                **more,
            )
        return [_until(end_of_row, ends) for end_of_row in output[:, length:].tolist()]


def _until(token_ids: list[int], ends: Sequence[int]) -> list[int]:
    """Cut what was written after the first token that ends it."""
    return next((token_ids[: i + 1] for i, token in enumerate(token_ids) if token in ends), token_ids)


def _common_end(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many of their last tokens two sequences have in common."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


@lru_cache
def sentence_starts(text: str) -> list[int]:
    """Return where sentences and lines begin in a text."""
    return [match.end() for match in re.finditer(r"(?:\A|\n|[.?!] )(?=\S)", text)] or [0]


def draw_piece(generator: random.Random, chat: Chat, windows: Sequence[Window], tokens: int) -> Piece:
    """Draw a window, and a piece of its text that begins where a sentence or line does."""
    sizes = [len(window.token_ids) for window in windows]
    (window,) = generator.choices(range(len(windows)), weights=sizes)
    text = windows[window].text
    starts = sentence_starts(text)
    size = generator.randint(tokens // 2, tokens)
    # the last places leave less than a piece: they would hold the same end again and again
    room = [i for i in starts if len(text) - i >= 2 * size] or starts[:1]
    piece = text[generator.choice(room) :]
    token_ids = chat.plain(piece[: 16 * size])[:size]
    return Piece(window, chat.text(token_ids).strip())


def study(
    model: Any,
    chat: Chat,
    windows: Sequence[Window],
    settings: SelfStudy,
    file: ConversationFile,
    report: Callable[[int], None] = lambda done: None,
) -> list[Conversation]:
    """
    Make conversations about a document, and continue where the file ends. Random draws depend only on the seed and a
    conversation's index, so the result is the same after a process was killed.

    Args:
        model: The model; its adapters are off.
        chat (`Chat`): The tokenizer's chat.
        windows (`Sequence[Window]`): The document's windows.
        settings (`SelfStudy`): How many, and how.
        file (`ConversationFile`): Where they are kept.
        report (`Callable[[int], None]`): Called with how many there are, after every batch.

    Returns:
        `list[Conversation]`: All of them.
    """
    conversations = file.read(settings.num_conversations)
    writer = Writer(model, chat, windows, settings.temperature)
    for batch in batches(settings.num_conversations, file.batch_size, len(conversations)):
        report(len(conversations))
        made = make_conversations(writer, settings, batch)
        file.append(made)
        conversations += made
    report(len(conversations))
    return conversations


def make_conversations(writer: Writer, settings: SelfStudy, places: Sequence[int]) -> list[Conversation]:
    """Return the conversations at these places in the file."""
    templates = [settings.templates[place % len(settings.templates)] for place in places]
    pieces = [
        draw_piece(random.Random(f"{settings.seed} {place}"), writer.chat, writer.windows, settings.piece_tokens)
        for place in places
    ]
    prompts = [template.fill(piece.text) for template, piece in zip(templates, pieces, strict=True)]
    answers: list[list[int]] = [[] for _ in places]
    with drawing(writer.base, settings.seed, places[0]):
        asking = [i for i, template in enumerate(templates) if template.asks]
        if asking:
            written = writer.prompts([prompts[i] for i in asking], settings.max_prompt_tokens)
            for i, prompt in zip(asking, written, strict=True):
                prompts[i] = prompt or prompts[i]
        answering = [i for i, template in enumerate(templates) if not template.recites]
        if answering:
            windows = [pieces[i].window for i in answering]
            written_ids = writer.answers([prompts[i] for i in answering], windows, settings.max_answer_tokens)
            for i, token_ids in zip(answering, written_ids, strict=True):
                answers[i] = token_ids
    for i, template in enumerate(templates):
        if template.recites:
            rest = pieces[i].text.split(maxsplit=WORDS_OF_START)[WORDS_OF_START:]
            answers[i] = writer.chat.plain("".join(rest) or pieces[i].text)[: settings.max_answer_tokens]
    return [
        Conversation(prompt, answer, piece.window, template.kind, writer.chat.text(answer))
        for prompt, answer, piece, template in zip(prompts, answers, pieces, templates, strict=True)
    ]


@contextmanager
def drawing(model: Any, seed: int, place: int) -> Iterator[None]:
    """Draw tokens by a seed and a place in the file, and leave the random state as it was."""
    device = execution_device(model)
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + place)
        yield


def answer_prompts(
    model: Any,
    chat: Chat,
    windows: Sequence[Window],
    prompts: Sequence[str],
    settings: SelfStudy,
    file: ConversationFile,
    report: Callable[[int], None] = lambda done: None,
) -> list[Conversation]:
    """Let the model answer given prompts, each with the window in its context that it is about, as [`study`] does."""
    conversations = file.read(len(prompts))
    writer = Writer(model, chat, windows, settings.temperature)
    for batch in batches(len(prompts), file.batch_size, len(conversations)):
        report(len(conversations))
        asked = [prompts[place] for place in batch]
        about = [writer.likeliest_window(prompt) for prompt in asked]
        with drawing(writer.base, settings.seed, batch[0]):
            answers = writer.answers(asked, about, settings.max_answer_tokens)
        made = [
            Conversation(prompt, answer, window, "prompt", chat.text(answer))
            for prompt, answer, window in zip(asked, answers, about, strict=True)
        ]
        file.append(made)
        conversations += made
    report(len(conversations))
    return conversations
