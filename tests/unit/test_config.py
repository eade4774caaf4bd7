"""Settings come from file, environment and command line; each is documented, and read somewhere."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dpo_ray.config import (
    CONFIGS,
    BetaSweepConfig,
    EvaluateConfig,
    HarnessConfig,
    IterativeDPOConfig,
    JudgeQualityConfig,
    OfflineDPOConfig,
    RewardModelConfig,
    ServeConfig,
    Settings,
    SFTConfig,
    parse_config,
)

ROOT = CONFIGS.parent


def parse(*arguments: str) -> IterativeDPOConfig:
    return parse_config(IterativeDPOConfig, arguments)


def settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of the tree by its dotted name, sections included."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")


JOBS: tuple[type[Settings], ...] = (
    IterativeDPOConfig,
    OfflineDPOConfig,
    BetaSweepConfig,
    SFTConfig,
    ServeConfig,
    RewardModelConfig,
    JudgeQualityConfig,
    EvaluateConfig,
    HarnessConfig,
)
ALL_SETTINGS = {name: field for job in JOBS for name, field in settings(job)}
OF_FILE: dict[str, tuple[type[Settings], ...]] = {
    "offline_film_reviews.yaml": (OfflineDPOConfig, BetaSweepConfig),
    "sft_film_reviews.yaml": (SFTConfig,),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text("seed: 1\ntraining:\n  epochs: 2\n  loss:\n    beta: 0.3\n")
    return path


def test_the_walk_finds_the_leaves() -> None:
    assert {"rounds", "training", "training.loss.beta", "gate.max_chosen_drop"} <= ALL_SETTINGS.keys()
    assert len(ALL_SETTINGS) > 40


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    for job in OF_FILE.get(path.name, (IterativeDPOConfig,)):
        assert parse_config(job, ["--config", str(path)]).model_dump()["rounds"] >= 1


@pytest.mark.parametrize("name", ALL_SETTINGS)
def test_every_setting_is_described(name: str) -> None:
    description = ALL_SETTINGS[name].description
    assert description is not None
    assert description.strip().endswith(".")


CODE = "\n".join(
    path.read_text()
    for folder in ("dpo_ray", "serve", "jobs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent.name != "config" or path.name == "loss.py"  # Which sums its terms itself.
)


@pytest.mark.parametrize("name", ALL_SETTINGS)
def test_every_setting_is_read(name: str) -> None:
    *_, attribute = name.split(".")
    assert re.search(rf"\.{attribute}\b(?!\s*\()", CODE), f"no code reads {name}"


def test_without_a_file_the_tiny_default_holds() -> None:
    assert parse() == parse("--config", str(CONFIGS / "tiny.yaml"))


def test_the_command_line_beats_the_environment_beats_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_file = parse("--config", str(file))
    assert (only_file.seed, only_file.training.epochs, only_file.training.loss.beta) == (1, 2, 0.3)
    monkeypatch.setenv("DPO_RAY_SEED", "5")
    monkeypatch.setenv("DPO_RAY_TRAINING__LOSS__BETA", "0.5")
    monkeypatch.setenv("DPO_RAY_TRAINING__BATCH_SIZE", "7")
    with_environment = parse("--config", str(file))
    assert (with_environment.seed, with_environment.training.loss.beta) == (5, 0.5)
    assert (with_environment.training.epochs, with_environment.training.batch_size) == (2, 7)
    with_arguments = parse("--config", str(file), "--seed", "9", "--training.loss.beta=0.9")
    assert (with_arguments.seed, with_arguments.training.loss.beta) == (9, 0.9)
    assert (with_arguments.training.epochs, with_arguments.training.batch_size) == (2, 7)


def test_an_unset_value_can_be_given(tmp_path: Path) -> None:
    assert parse().buffer.max_age is None
    assert parse("--buffer.max_age", "2").buffer.max_age == 2
    (tmp_path / "a.yaml").write_text("buffer:\n  max_age: null\n")
    assert parse("--config", str(tmp_path / "a.yaml")).buffer.max_age is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope", "1"], "unrecognized arguments: --nope"),
        (["--training.nope=1"], "unrecognized arguments: --training.nope=1"),
        (["stray"], "unrecognized arguments: stray"),
        (["--rounds"], "argument --rounds: expected one argument"),
        (["--rounds", "many"], "rounds: Input should be a valid integer"),
        (["--rounds", "0"], "rounds: Input should be greater than or equal to 1"),
        (["--training.learning_rate", "nan"], "training.learning_rate: Input should be a finite number"),
        (["--training.learning_rate", "inf"], "training.learning_rate: Input should be a finite number"),
        (["--training.loss.type", "nope"], "training.loss.type: Input should be 'sigmoid', "),
        (
            ["--training.loss.type=ipo", "--training.loss.label_smoothing=0.1"],
            "error: training.loss: label_smoothing=0.1 is not read by the ipo loss: ",
        ),
        (["--training.lora.rank=8", "--training.reference.kind=ema"], "set reference.kind to start"),
        (["--training.early_stopping.patience=2"], "a bound needs evaluations to look at"),
        (["--training.early_stopping.eval_every_steps=2"], "which only offline jobs have"),
        (["--prompts", "mine.jsonl"], "the judge of film reviews cannot score prompts of mine.jsonl"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
    ],
)
def test_a_wrong_argument_ends_with_code_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nope: 1", "nope is no setting: see --help"),
        ("training:\n  loss:\n    nope: 1", "training.loss.nope is no setting: see --help"),
        ("training: 3", "training: "),
        ("rounds: [1, 2]", "rounds: Input should be a valid integer"),
        ("- rounds", "holds a list, not settings by name"),
        ("rounds: [1\ntraining: 2", "is not YAML"),
    ],
)
def test_a_wrong_file_ends_with_code_2_and_one_line(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as ended:
        parse("--config", str(path))
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_an_unknown_section_of_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_RAY_TRAINING__NOPE", "1")
    with pytest.raises(SystemExit):
        parse()
    assert "training.nope is no setting" in capsys.readouterr().err


def test_a_parsed_tree_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse().training.epochs = 3  # type: ignore[misc]


def test_parsing_settings_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from dpo_ray.config import IterativeDPOConfig, parse_config; "
        "parse_config(IterativeDPOConfig, []); print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_help_lists_every_setting_with_its_meaning(
    job: type[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_config(job, ["--help"])
    text = unspaced(capsys.readouterr().out)  # Help is wrapped, at hyphens too.
    assert ended.value.code == 0
    for name, field in settings(job):
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        assert f"--{name}" in text, name
        assert unspaced(field.description or "") in text, name


def unspaced(text: str) -> str:
    return "".join(text.split())
