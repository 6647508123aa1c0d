import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from veneer import LoraConfig
from veneer.config import all_matches, first_match, matches_end, patterns, rank_and_alpha

PARTS = st.sampled_from(["q", "k", "qq", "0", "1", "10", "a_b", "a-b", "", "x y", "é"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
# names as a user writes them, names with escaped or stray dots, and expressions
KEYS = st.one_of(
    PATHS,
    PATHS.map(lambda path: path.replace(".", r"\.")),
    PATHS.map(lambda path: "^" + path),
    st.text(alphabet="q0a_b.", min_size=1, max_size=6),
    st.sampled_from([r".*", r"q.*", r"(q|k)", r"^q", r"[01]\..*", r"q+", r"a.b", r"0\.q|k", r"\d+", r"q$", r"", r"\."]),
)


@settings(max_examples=2000, deadline=None)
@given(st.lists(KEYS, max_size=6, unique=True), st.one_of(PATHS, st.text(alphabet="q0a_b.^", max_size=8)))
@example(["a.b"], "x.a_b")  # a dot of a key stands for any character
@example([r"a\.b", "a.b"], "x.a_b")
@example(["0.q", "^0.q", "q"], "10.q")
@example(["^q"], "^q")
@example([".q", "^.q"], "q")
@example(["q", ".*"], "k.q")
@example([".*", "q"], "k.q")
def test_the_first_key_that_matches_is_the_one_that_trying_each_finds(keys, path):
    assert first_match(keys, path) == next((key for key in keys if matches_end(key, path)), None)


@pytest.mark.parametrize("write", [str, lambda path: path.replace(".", r"\."), lambda path: f"^{path}"])
def test_a_key_for_each_layer_of_a_large_model_is_quick(write):
    paths = [f"model.layers.{layer}.{block}.proj" for layer in range(400) for block in ("q", "k", "gate", "down")]
    config = LoraConfig(
        rank_pattern={write(path): 1 + place for place, path in enumerate(paths)},
        alpha_pattern={write(path): 1 + place for place, path in enumerate(reversed(paths))},
    )
    start = time.process_time()
    found = [rank_and_alpha(config, path) for path in paths]
    assert time.process_time() - start < 10
    assert found == [(1 + place, len(paths) - place) for place in range(len(paths))]


@settings(max_examples=500, deadline=None)
@given(st.lists(KEYS, max_size=6, unique=True), st.lists(PATHS, max_size=4))
@example(["a.b", r"a\.b", "^x.a_b"], ["x.a_b", "a.b"])
def test_the_keys_that_match_any_path_are_those_that_trying_each_finds(keys, paths):
    assert all_matches(keys, paths) == {key for key in keys if any(matches_end(key, path) for path in paths)}


def test_names_are_looked_up_and_not_tried(monkeypatch):
    monkeypatch.setattr(patterns, "matches", lambda pattern, path: pytest.fail(f"{pattern!r} is tried on {path!r}"))
    keys = [f"layer_{i}" for i in range(300)]
    assert all_matches(keys, ["model.layer_7.q_proj", "model.layer_7"]) == {"layer_7"}
    assert first_match(keys, "model.layer_7") == "layer_7"
