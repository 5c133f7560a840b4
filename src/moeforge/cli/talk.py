"""Conversations with a model: in this process or behind a URL, as messages or as one growing text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.generate import End, Engine, Sampling, Token
    from moeforge.serve.template import ChatTemplate

INSTALL = "chat with a URL needs the openai package, which is not installed: pip install 'moeforge[serve]'"


class Talk(Protocol):
    """One conversation."""

    messages: bool
    """Whether it goes through a chat template; else what is said and what is written are one text."""

    def say(self, text: str) -> None:
        """What the user says next. Raises UserError when it cannot be taken; nothing is changed then."""

    def answer(self, sampling: "Sampling", show_experts: bool) -> "Iterator[tuple[str, dict[int, list[int]]]]":
        """The model's words as they come, with their experts. Raises UserError."""

    @property
    def full(self) -> bool:
        """Whether the last answer ended because there is no more room."""
        ...


class Text:
    """One growing text of an engine in this process."""

    messages = False

    def __init__(self, engine: "Engine") -> None:
        from moeforge.generate import Document

        self.document = Document(engine)
        self.full = False

    def say(self, text: str) -> None:
        """Adds it as it is."""
        self.document.read(text)

    def answer(self, sampling: "Sampling", show_experts: bool) -> "Iterator[tuple[str, dict[int, list[int]]]]":
        """Goes on."""
        yield from _words(self, self.document.write(sampling, show_experts))


class Messages:
    """Messages through the template of a model in this process."""

    messages = True

    def __init__(self, engine: "Engine", template: "ChatTemplate") -> None:
        self.engine, self.template, self.full = engine, template, False
        self.said: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        """A message of the user."""
        _add(self.said, text)

    def answer(self, sampling: "Sampling", show_experts: bool) -> "Iterator[tuple[str, dict[int, list[int]]]]":
        """The model's message."""
        from moeforge.generate import Document

        document = Document(self.engine)
        with _turn(self.said) as written:
            document.tokens = self.template.prompt(self.said, None, {})
            for word in _words(self, document.write(sampling, show_experts)):
                written.append(word[0])
                yield word


class Remote:
    """A server that speaks the OpenAI API: messages, or one text where its model has no template."""

    def __init__(self, client: Any, model: str, messages: bool) -> None:
        self.client, self.model, self.messages, self.full = client, model, messages, False
        self.said: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        """The user's part."""
        if self.messages:
            _add(self.said, text)
        else:
            self.said.append({"role": "user", "content": text})

    def answer(self, sampling: "Sampling", show_experts: bool) -> "Iterator[tuple[str, dict[int, list[int]]]]":
        """What the server streams."""
        asked: dict[str, Any] = {"model": self.model, "temperature": sampling.temperature, "stream": True}
        asked |= {"max_tokens": sampling.max_tokens} | ({} if sampling.seed is None else {"seed": sampling.seed})
        with _turn(self.said) as written, _errors():
            if self.messages:
                events = self.client.chat.completions.create(messages=self.said, **asked)
            else:
                text = "".join(message["content"] for message in self.said)
                events = self.client.completions.create(prompt=text, **asked)
            with events:
                for event in events:
                    for choice in event.choices:
                        word = (choice.delta.content if self.messages else choice.text) or ""
                        written.append(word)
                        yield word, {}


def open_talks(engine: "Engine", folder: Path) -> Callable[[], Talk]:
    """What starts a conversation with an engine: through the folder's chat template where there is one."""
    from moeforge.hub.folder import model_folder
    from moeforge.serve.template import ChatTemplate

    template = ChatTemplate.open(model_folder(folder), engine.tokenizer)
    return (lambda: Text(engine)) if template is None else (lambda: Messages(engine, template))


def open_remote(url: str, key: str | None) -> Callable[[], Talk]:
    """What starts a conversation with a server. Raises UserError where there is none, or it wants a key."""
    try:
        import openai
    except ImportError as error:
        raise UserError(INSTALL) from error
    base = url.rstrip("/").removesuffix("/v1")
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=key or "none", max_retries=2)
    with _errors():
        models = [model.id for model in client.models.list().data]
        if not models:
            raise UserError(f"{url} serves no model")
        messages = _has_template(client, models[0])
    return lambda: Remote(client, models[0], messages)


def _has_template(client: Any, model: str) -> bool:
    """Asks for one token: a server of ours says when there is none; of others it is taken for granted."""
    import openai

    try:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}], max_tokens=1)
    except openai.BadRequestError as error:
        return error.code != "no_chat_template"
    return True


@contextmanager
def _errors() -> Iterator[None]:
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        raise UserError(f"{error.request.url} does not answer: is a server running there?") from error
    except openai.AuthenticationError as error:
        raise UserError("the server wants an API key: put it into MOEFORGE_API_KEY") from error
    except openai.APIError as error:
        raise UserError(f"the server says: {error.message}") from error


def _add(said: list[dict[str, Any]], text: str) -> None:
    if not text.strip():
        raise UserError("an empty line says nothing: type a message")
    said.append({"role": "user", "content": text})


@contextmanager
def _turn(said: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Collects the model's words into its message. A turn that ends before the first is as if it had not been asked."""
    written: list[str] = []
    try:
        yield written
    except BaseException:  # Ctrl-C too
        if not any(written):
            said.pop()
            raise
        said.append({"role": "assistant", "content": "".join(written)})
        raise
    said.append({"role": "assistant", "content": "".join(written)})


def _words(talk: Any, events: "Iterator[Token | End]") -> "Iterator[tuple[str, dict[int, list[int]]]]":
    from moeforge.generate import End

    for event in events:
        if isinstance(event, End):
            talk.full = event.stop == "context full"
            yield event.text, {}
        else:
            yield event.text, event.experts or {}
