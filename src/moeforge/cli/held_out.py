"""Which text a model is judged by: a run's own, or what the command line names."""

from pathlib import Path
from typing import TYPE_CHECKING

from moeforge.errors import UserError

if TYPE_CHECKING:
    from moeforge.models import ModelConfig
    from moeforge.train import RunConfig

SETTINGS = ("data", "seq_len", "batch_size", "dtype")
"""Of a run's settings, those that an evaluation depends on."""


def check(settings: list[str]) -> None:
    """Raises UserError for a setting that would change nothing."""
    from moeforge.config import nearest

    for text in settings:
        name = text.removeprefix("--").partition("=")[0].partition(".")[0].replace("-", "_")
        if name not in SETTINGS:
            raise UserError(f"{text} changes no evaluation.{nearest(name, SETTINGS)} Valid: {', '.join(SETTINGS)}")


def text_settings(folder: Path, model: "ModelConfig", settings: list[str]) -> "RunConfig":
    """The run's settings, or the defaults, with ``settings`` laid on top."""
    from moeforge.config import build, merge, override, read_yaml
    from moeforge.train import RunConfig

    file = folder / "config.yaml"
    run = read_yaml(file) if file.exists() else {"seq_len": min(RunConfig().seq_len, model.max_seq_len)}
    asked = override({}, settings)
    data = asked.get("data")
    if isinstance(data, dict) and "path" in data and "type" not in data:
        asked["data"] = {"type": "files", **data}
    base = {name: run[name] for name in SETTINGS if name in run}
    return build(RunConfig, {**merge(base, asked), "model": model.model_dump()}, source="evaluate")


def count(text: str) -> int:
    """``--tokens``: a number of them. Raises UserError."""
    from pydantic import TypeAdapter, ValidationError

    from moeforge.config import Count

    try:
        number = TypeAdapter(Count).validate_python(text)
    except ValidationError as error:
        raise UserError(f"--tokens={text} is no number of tokens; try 50000 or 50k") from error
    if number < 1:
        raise UserError(f"--tokens={text}: there must be at least one")
    return number
