"""Settings from the command line, the environment and a file."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml
from pydantic import ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

_SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable for the entry point of a submitted job."""
CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


class Settings(BaseSettings):
    """Settings from the command line, the environment and a file, in that order."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        nested_model_default_partial_update=True,
        env_prefix="DPO_RAY_",
        env_nested_delimiter="__",
    )

    default_file: ClassVar[Path | None] = None
    """Settings that hold where no `--config` is given."""

    run_dir: str = "runs/run"
    """Folder of the run: a path that every node sees, or a URL (s3://, gs://, …)."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The file's settings are the initial ones: the environment and the command line go over them."""
        return env_settings, init_settings

    @field_validator("run_dir")
    @classmethod
    def _resolve_run_dir(cls, run_dir: str) -> str:
        return resolve_run_dir(run_dir)


def resolve_run_dir(run_dir: str) -> str:
    """An absolute folder, or the URL itself.

    A submitted job runs in a temporary copy of the working directory: a relative folder is then below
    ~/dpo_ray, where it outlives the job.
    """
    if "://" in run_dir:
        return run_dir
    base = Path.home() / "dpo_ray" if _SUBMITTED_JOB in os.environ else Path.cwd()
    return str(base / Path(run_dir).expanduser())


AnySettings = TypeVar("AnySettings", bound=Settings)


def parse_config(config_type: type[AnySettings], arguments: Sequence[str]) -> AnySettings:
    """The command line over environment variables (DPO_RAY_…) over the file of `--config`.

    Exits with code 2 and one message where a setting is unknown or wrong.
    """
    file_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config", type=Path, default=config_type.default_file)
    known, rest = file_parser.parse_known_args(arguments)
    try:
        initial = _read_yaml(known.config) if known.config else {}
        return config_type(_cli_parse_args=rest, **initial)  # type: ignore[call-arg]
    except ValidationError as error:
        exit_with("; ".join(map(_sentence, error.errors())))
    except (SettingsError, ValueError, OSError) as error:
        exit_with(str(error))


def exit_with(message: str, *, code: int = 2) -> NoReturn:
    """End the process with one sentence; 2 is the code for wrong settings."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--config {path} holds a {type(settings).__name__}, not settings by name")
    return settings


def _sentence(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name} is no setting: see --help"
    if error["type"] == "value_error":  # Written by us, with the value and the remedy.
        return f"{name}: {error['ctx']['error']}".removeprefix(": ")
    given = f" (got {error['input']!r})" if error["loc"] else ""
    return f"{name}: {error['msg']}{given}".removeprefix(": ")
