import pytest

from veneer.train.scoring import Scores, parse_object, score

WANTED = ['{"a": "1", "b": "2"}', '{"a": "3"}']


def test_right_answers() -> None:
    assert score(['{"b": "2", "a": "1"}', ' {"a": "3"}\n'], WANTED) == Scores(2, 1.0, 1.0, 1.0)


def test_partly_right_answers_count_pairs() -> None:
    found = score(['{"a": "1", "b": "9"}', "no idea"], WANTED)
    assert (found.valid, found.exact) == (0.5, 0.0)
    assert found.f1 == pytest.approx(2 * 1 / (2 + 3))


def test_a_value_must_have_the_right_type() -> None:
    assert score(['{"a": 3}'], ['{"a": "3"}']).f1 == 0.0


def test_nothing_answered_is_zero() -> None:
    assert score(["", ""], WANTED) == Scores(2, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("text", ["", "[1]", "3", 'Sure: {"a": 1}', '```json\n{"a": 1}\n```', '{"a": 1', "[" * 100_000])
def test_what_is_not_one_json_object(text: str) -> None:
    assert parse_object(text) is None
