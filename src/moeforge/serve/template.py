"""Chat templates: a model's own jinja text turns messages into its prompt."""

import json
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from moeforge.data.tokenizers import Tokenizer
from moeforge.errors import UserError

INSTALL = "chat templates need jinja2, which is not installed: pip install 'moeforge[serve]'"


class ChatTemplate:
    """The template of a model folder, in jinja's sandbox: a model's folder is not trusted with code."""

    def __init__(self, text: str, tokens: dict[str, Any], tokenizer: Tokenizer) -> None:
        self._text, self._tokens, self._tokenizer = text, tokens, tokenizer

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """As ``chat_template.jinja`` or ``tokenizer_config.json`` has it; None where neither does. Raises UserError."""
        settings: dict[str, Any] = {}
        beside, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            if beside.exists():
                settings = json.loads(beside.read_text(encoding="utf-8"))
            text = own.read_text(encoding="utf-8") if own.exists() else settings.get("chat_template")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: the chat template cannot be read: {error}") from error
        if isinstance(text, list):  # several by name
            text = next((entry["template"] for entry in text if entry.get("name") == "default"), None)
        if not isinstance(text, str):
            return None
        named = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        tokens = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items() if t}
        return cls(text, tokens, tokenizer)

    @cached_property
    def _compiled(self) -> Any:
        try:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UserError(INSTALL) from error
        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        room.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        known: dict[str, Any] = {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        room.globals.update(known)
        return room.from_string(self._text)

    @cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """Here, unlike in a text, the name of a special token is that token."""
        inner = tokenizers.Tokenizer.from_str(self._tokenizer.inner.to_str())
        inner.encode_special_tokens = False
        return inner

    def prompt(self, messages: list[dict[str, Any]], tools: list[Any] | None, more: dict[str, Any]) -> list[int]:
        """Token ids of a conversation, open for the model's answer. Raises UserError where the template refuses it."""
        from jinja2 import TemplateError

        facts = {"messages": messages, "tools": tools, "add_generation_prompt": True, **self._tokens, **more}
        try:
            text = self._compiled.render(**facts)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"messages: the model's chat template does not take them: {error}") from error
        return self._with_specials.encode(text, add_special_tokens=False).ids


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
