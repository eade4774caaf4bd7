"""Ray Data gives the pairs that are read without it, in the same order."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from dpo_ray import ray_data
from dpo_ray.models import load_tokenizer
from dpo_ray.preference_data import load_pairs
from dpo_ray.ray_data import load_pairs_with_ray
from dpo_ray.starter import make_review_tokenizer

FINE = [
    {"prompt": "the film was", "chosen": f"great {'so ' * (n % 9)}.", "rejected": "dull ."}
    for n in range(3000)
]
ROWS = [*FINE[:2500], {**FINE[0], "rejected": " "}, *FINE[2500:], {**FINE[0], "prompt": "so " * 20}]


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_review_tokenizer().save_pretrained(folder)
    return str(folder)


def test_ray_data_gives_the_pairs_that_are_read_without_it(
    small_ray: None, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS[::-1]), tmp_path / "b.parquet", row_group_size=500)
    monkeypatch.setattr(ray_data, "PART_BYTES", 50_000)
    limits = {"max_tokens": 14, "long_prompts": "cut_start"}
    expected = load_pairs(str(tmp_path), split="train", tokenizer=load_tokenizer(model), **limits)
    sets = list(load_pairs_with_ray(str(tmp_path), model=model, **limits))
    assert tuple(pair for some in sets for pair in some.pairs) == expected.pairs
    assert sum((Counter(some.dropped) for some in sets), Counter()) == expected.dropped == {"empty": 2}
    assert sum(some.truncated for some in sets) == expected.truncated == 2
    assert len(sets) > 6
    assert max(len(some.pairs) for some in sets) <= 1024
    # The Parquet file holds the rows backwards: its row 502 is the one without a rejected completion.
    assert (502, "empty") in [row for some in sets for row in some.dropped_rows]


def test_ray_data_refuses_what_load_pairs_refuses(small_ray: None, model: str, tmp_path: Path) -> None:
    rows = [FINE[0], {"prompt": "the film", "completion": "was great .", "label": True}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: one completion .*--training\.loss\.type"):
        list(load_pairs_with_ray(str(tmp_path / "a.jsonl"), model=model, max_tokens=14))
    (made,) = load_pairs_with_ray(
        str(tmp_path / "a.jsonl"), model=model, max_tokens=14, unpaired_allowed=True
    )
    assert [pair.is_unpaired for pair in made.pairs] == [False, True]
    with pytest.raises(ValueError, match=r"no pairs in .*a\.jsonl \(left out: \{'too_long': 2"):
        list(load_pairs_with_ray(str(tmp_path / "a.jsonl"), model=model, max_tokens=3, unpaired_allowed=True))
    with pytest.raises(ValueError, match=r"--model .*nowhere"):
        list(load_pairs_with_ray(str(tmp_path / "a.jsonl"), model=str(tmp_path / "nowhere"), max_tokens=3))
