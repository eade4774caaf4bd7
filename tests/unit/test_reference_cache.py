"""Reference log-probs outlive a run, exactly, and are never taken for another reference's."""

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from families import make_model
from learners import make_learner
from textbook import make_pairs

from dpo_ray import reference_logps
from dpo_ray.reference_cache import ReferenceCache, fingerprint

NUMBERS = {"a": (-1 / 3, -2e-300), "b": (0.0, -math.inf), "c": (-12.5, 0.1)}


def test_what_is_written_is_read_exactly(tmp_path: Path) -> None:
    ReferenceCache("start", tmp_path).write(NUMBERS)
    assert ReferenceCache("start", tmp_path).read(["c", "a", "unknown", "b"]) == NUMBERS
    assert ReferenceCache("start", tmp_path).read(["b"]) == {"b": NUMBERS["b"]}
    assert ReferenceCache("start", tmp_path).read([]) == {}


def test_each_reference_has_its_own(tmp_path: Path) -> None:
    first, second = ReferenceCache("first", tmp_path), ReferenceCache("second", tmp_path)
    first.write({"a": (1.0, 2.0)})
    assert second.read(["a"]) == {}
    second.write({"a": (3.0, 4.0)})
    assert first.read(["a"]) == {"a": (1.0, 2.0)}


def test_the_last_one_written_counts(tmp_path: Path) -> None:
    cache = ReferenceCache("start", tmp_path)
    cache.write({"a": (1.0, 2.0), "b": (5.0, 6.0)})
    cache.write({"a": (3.0, 4.0)})
    cache.write({})
    assert cache.read(["a", "b"]) == {"a": (3.0, 4.0), "b": (5.0, 6.0)}


def test_many_pairs_are_more_than_one_question(tmp_path: Path) -> None:
    cache = ReferenceCache("start", tmp_path)
    many = {str(number): (float(number), -float(number)) for number in range(1201)}
    cache.write(many)
    assert cache.read(list(many)) == many


def test_what_is_no_number_is_computed_again(tmp_path: Path) -> None:
    cache = ReferenceCache("start", tmp_path)
    cache.write({"a": (math.nan, -1.0), "b": (-1.0, math.nan), "c": (-1.0, -2.0)})
    assert cache.read(["a", "b", "c"]) == {"c": (-1.0, -2.0)}


def test_runs_that_start_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    for attempt in range(5):
        folder, barrier = tmp_path / str(attempt), Barrier(8)

        def open_and_write(number: int, folder: Path = folder, barrier: Barrier = barrier) -> None:
            barrier.wait()
            ReferenceCache("start", folder).write({str(number): (float(number), 0.0)})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(open_and_write, range(8)))
        known = ReferenceCache("start", folder).read([str(number) for number in range(8)])
        assert known == {str(number): (float(number), 0.0) for number in range(8)}


def test_the_cache_is_where_the_environment_says(own_cache: Path) -> None:
    ReferenceCache("start").write(NUMBERS)
    assert (own_cache / "reference_logps.sqlite").exists()
    assert ReferenceCache("start", own_cache).read(list(NUMBERS)) == NUMBERS


def test_the_fingerprint_is_of_weights_and_settings_alone(tmp_path: Path) -> None:
    model = make_model("Llama")
    model.save_pretrained(tmp_path / "a")
    before = fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("The same model.")
    assert fingerprint(tmp_path / "b") == before
    model.config.rms_norm_eps = 1e-3
    model.save_pretrained(tmp_path / "b")
    assert fingerprint(tmp_path / "b") != before
    model.config.rms_norm_eps = make_model("Llama").config.rms_norm_eps
    next(model.parameters()).data[3, 3] += 1e-3
    model.save_pretrained(tmp_path / "b")
    assert fingerprint(tmp_path / "b") != before


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs the reference was asked to score, call by call."""
    calls: list[int] = []
    score = reference_logps.score

    def counting(scorer: object, groups: list[object], *args: object, **kwargs: object) -> object:
        calls.append(len(groups))
        return score(scorer, groups, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_logps, "score", counting)
    return calls


BATCHES = [make_pairs(4, seed=1), make_pairs(3, seed=2), make_pairs(2, seed=3)]
"""The last are held out, say."""


def test_a_second_run_computes_nothing_but_its_first_batch(tiny_model: Path, computed: list[int]) -> None:
    first = make_learner(tiny_model)
    first.reference.begin_round(BATCHES)
    assert computed == [4, 3, 2]
    computed.clear()
    second = make_learner(tiny_model)
    second.reference.begin_round([BATCHES[1], BATCHES[0], BATCHES[2]])
    assert computed == [3]  # Its first step shows that policy and reference see the same tokens.
    computed.clear()
    for batch in BATCHES:
        assert second.reference.logps(batch) == first.reference.logps(batch)
    assert computed == []


@pytest.mark.parametrize(
    "other",
    [
        {"loss": {"ld_alpha": 0.5}},
        {"precision": "bfloat16"},
        {"packing": False},
        {"reference": {"keep_logps": False}},
        {"reference": {"kind": "round_start"}},
    ],
    ids=str,
)
def test_what_decides_a_log_prob_decides_where_it_is_kept(
    tiny_model: Path, near_model: Path, computed: list[int], other: dict[str, object]
) -> None:
    make_learner(near_model, tiny_model).reference.begin_round(BATCHES)
    computed.clear()
    make_learner(near_model, tiny_model, **other).reference.begin_round(BATCHES)
    assert computed == [4, 3, 2]
    computed.clear()
    make_learner(near_model, tiny_model, batch_size=7).reference.begin_round(BATCHES)
    assert computed == []


def test_another_start_has_its_own(tiny_model: Path, near_model: Path, computed: list[int]) -> None:
    make_learner(near_model, tiny_model).reference.begin_round(BATCHES)
    computed.clear()
    make_learner(tiny_model, near_model).reference.begin_round(BATCHES)
    assert computed == [4, 3, 2]


def test_an_adapters_start_is_the_plain_start(
    tiny_model: Path, near_model: Path, computed: list[int]
) -> None:
    make_learner(near_model, tiny_model).reference.begin_round(BATCHES)
    computed.clear()
    make_learner(tiny_model, lora={"rank": 2}).reference.begin_round(BATCHES)
    assert computed == [4]


@pytest.mark.parametrize("reference", [{"keep_logps": False}, {"kind": "round_start"}, {"kind": "ema"}])
def test_nothing_is_kept_where_nothing_should_be(
    tiny_model: Path, own_cache: Path, reference: dict[str, object]
) -> None:
    make_learner(tiny_model, reference=reference).train_step(BATCHES[0])
    assert not own_cache.exists()
