"""A Hugging Face sequence classifier as a judge."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from dpo_ray.config import JudgeTerm
from dpo_ray.tokenization import TemplateSettings, template_settings, tokenize_messages
from dpo_ray.types import Completion, Judgement, Text

disable_progress_bar()  # Jobs show their own progress.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RewardModelJudge:
    """Completions in, rewards out: sorted by length, so that batches have little padding."""

    def __init__(self, term: JudgeTerm) -> None:
        """ValueError: there is no such model."""
        check_reward_model(term.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model, self._tokenizer = load_reward_model(term.model, dtype=_DTYPES[term.dtype])
        self._model.to(torch.device(device)).eval()  # type: ignore[arg-type]
        self._term = term

    def __call__(self, completions: Sequence[Completion]) -> list[Judgement]:
        rows = [self._token_ids(completion) for completion in completions]
        kept = [row[-self._term.max_length :] for row in rows]
        rewards = score_rows(self._model, kept, batch_size=self._term.batch_size)
        return [
            Judgement(reward, {"truncated": float(len(row) > self._term.max_length)})
            for reward, row in zip(rewards, rows, strict=True)
        ]

    def _token_ids(self, completion: Completion) -> list[int]:
        prompt = completion.prompt
        settings = template_settings(prompt.fields) if isinstance(prompt.text, list) else {}
        return reward_row(self._tokenizer, prompt.text, completion.text, settings)


def load_reward_model(
    name: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with one output and its tokenizer; a language model gets a new head. ValueError: none there."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{name}: no model with one reward can be loaded from there: {error}") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return model, tokenizer


def check_reward_model(name: str | Path) -> None:
    """ValueError: what is there is no reward model."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"judge.model {name}: no model can be loaded from there: {error}") from error
    architectures = config.architectures or []
    if not any("SequenceClassification" in architecture for architecture in architectures):
        raise ValueError(
            f"judge.model {name} is {', '.join(architectures) or 'of no known architecture'}, and no "
            "sequence classifier: train one with jobs/reward_model.py"
        )


def reward_row(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, settings: TemplateSettings
) -> list[int]:
    """What the model reads: the text, or the conversation in the chat template."""
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        return list(tokenizer(prompt + completion).input_ids)
    answer: Text = (
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    )
    return list(
        tokenize_messages([*prompt, *answer], tokenizer, add_generation_prompt=False, settings=settings)
    )


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: Sequence[list[int]], *, batch_size: int) -> list[float]:
    """Rewards in the order of the rows, computed in batches of about equal length."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    rewards = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        for place, reward in zip(
            places, batch_rewards(model, [rows[place] for place in places]).tolist(), strict=True
        ):
            rewards[place] = reward
    return rewards


def batch_rewards(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """[B] rewards in float32."""
    longest = max(map(len, rows))
    pad = model.config.pad_token_id
    token_ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    return model(input_ids=token_ids, attention_mask=mask.long()).logits[:, 0].float()
