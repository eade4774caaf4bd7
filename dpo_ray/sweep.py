"""What came of several values of beta, side by side."""

import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
from ray.tune import Callback
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dpo_ray.storage import Storage
from dpo_ray.terminal import Terminal

_COLUMNS = {
    "beta": ("beta", "g"),
    "eval/reward_mean": ("reward", ".3f"),
    "kl/start": ("KL to start", ".2f"),
    "eval/rewards/accuracies": ("accuracy", ".3f"),
    "eval/rewards/margins": ("margin", ".3f"),
    "eval/chosen_log_ratio": ("chosen log-ratio", ".2f"),
    "eval/loss": ("loss", ".4f"),
    "eval/length_mean": ("length", ".1f"),
}
_INK = "#1f3a5f"


class SayTrials(Callback):
    """One line when a run begins, and one when it is done. Ray Tune pickles it: it has no state."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        Terminal().say(f"beta {trial.config['beta']:g}: training")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        reached = f"reward {result['eval/reward_mean']:.3f} · KL {result['kl/start']:.2f}"
        Terminal().say(
            f"beta {result['beta']:g}: {reached} · "
            f"accuracy {result['eval/rewards/accuracies']:.3f} · {result['time_total_s']:.0f} s"
        )


def sweep_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per beta."""
    table = Table(*(title for title, _ in _COLUMNS.values()), box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(format(row.get(name, float("nan")), form) for name, (_, form) in _COLUMNS.items()))
    return table


def write_sweep(storage: Storage, rows: Sequence[dict[str, Any]], *, start_reward: float) -> str:
    """beta_sweep.json and beta_sweep.svg; the path of the plot."""
    storage.write_text("beta_sweep.json", json.dumps(list(rows), indent=2) + "\n")
    figure, (frontier, accuracy) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kl = [0.0, *(row["kl/start"] for row in rows)]
    reward = [start_reward, *(row["eval/reward_mean"] for row in rows)]
    labels = ["start", *(f"β {row['beta']:g}" for row in rows)]
    order = sorted(range(len(kl)), key=lambda index: kl[index])
    frontier.plot([kl[i] for i in order], [reward[i] for i in order], "o-", color=_INK)
    for x, y, label in zip(kl, reward, labels, strict=True):
        frontier.annotate(label, (x, y), textcoords="offset points", xytext=(6, -12))
    frontier.set(xlabel="KL to the start, nats per completion (sampled)", ylabel="mean reward")
    frontier.set_title("Reward against KL")
    accuracy.semilogx(
        [row["beta"] for row in rows], [row["eval/rewards/accuracies"] for row in rows], "o-", color=_INK
    )
    accuracy.set(xlabel="β", ylabel="held-out rewards/accuracies", title="Accuracy on held-out pairs")
    for axes in (frontier, accuracy):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.18, 0.12)
    drawing = BytesIO()
    figure.savefig(drawing, format="svg")
    plt.close(figure)
    storage.write_bytes("beta_sweep.svg", drawing.getvalue())
    return f"{storage.root}/beta_sweep.svg"
