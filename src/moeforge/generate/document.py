"""One text that grows: by what a user adds, and by what the model writes."""

from collections.abc import Iterator
from typing import NamedTuple

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError
from moeforge.generate.engine import Engine
from moeforge.generate.opening import engine_for
from moeforge.generate.request import End, Token
from moeforge.generate.sample import Sampling
from moeforge.generate.settings import Settings
from moeforge.models import Decoder

ALONE = Settings(max_running=1)
"""Room for the keys and values of one text."""


class Document:
    """``read`` adds given text, ``write`` lets the model go on. The engine keeps what it has read of it so far.

    It starts as the tokenizer has documents start: ours with the end of the one before.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tokens = engine, [*engine.tokenizer.start_ids]
        self._start = len(self.tokens)

    def read(self, text: str) -> None:
        """Appends ``text``. Raises UserError, and appends nothing, when no room would be left to write."""
        tokenizer, most = self.engine.tokenizer, self.engine.max_len
        ids = tokenizer.encode_inside(text) if len(self.tokens) > self._start else tokenizer.encode(text)
        if len(self.tokens) + len(ids) >= most:
            room = max(0, most - len(self.tokens) - 1)
            raise UserError(f"the text has {len(ids)} tokens, but the context of {most} has room for {room}")
        self.tokens += ids

    def write(self, sampling: Sampling, show_experts: bool = False) -> Iterator[Token | End]:
        """The model's tokens, then why there are no more. Raises UserError when the request fails.

        Whoever stops listening stops the model; the document then ends with the last token that was listened to.
        """
        for event in self.engine.write([*self.tokens], sampling, show_experts):
            if isinstance(event, Token):
                self.tokens.append(event.token_id)
                yield event
            elif isinstance(event, End):
                if event.stop == "failed":
                    raise UserError(event.error or "the request failed")
                yield event


class Written(NamedTuple):
    """What the model wrote, and why it ends there."""

    tokens: list[Token]
    end: End

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(token.text for token in self.tokens) + self.end.text


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    unsafe_batch_dependent: bool = False,
    domain: str | None = None,
) -> Written:
    """Continues ``prompt``, which may be empty, each token with its experts. Raises UserError as ``Document`` does."""
    settings = ALONE.replace(unsafe_batch_dependent=unsafe_batch_dependent)
    with engine_for(model, tokenizer, settings, domain) as engine:
        document = Document(engine)
        document.read(prompt)
        *tokens, end = document.write(sampling, show_experts=bool(model.moe_layers))
    return Written(tokens, end)  # type: ignore[arg-type]
