import pytest

from veneer.suggest import closest, did_you_mean

NAMES = ["q_proj", "k_proj", "v_proj", "lm_head", "embed_tokens"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("q_porj", "q_proj"),
        ("q_prjo", "q_proj"),
        ("Q_PROJ", "q_proj"),
        ("v_prjo", "v_proj"),
        ("lm_heads", "lm_head"),
        ("embed_token", "embed_tokens"),
    ],
)
def test_a_slip_finds_the_name(typed, meant):
    assert closest(typed, NAMES) == [meant]
    assert did_you_mean(typed, NAMES) == f", did you mean {meant!r}?"


@pytest.mark.parametrize("typed", ["", "x", "attention", "zzzzzz"])
def test_nothing_like_it_gives_no_suggestion(typed):
    assert closest(typed, NAMES) == []
    assert did_you_mean(typed, NAMES) == ""


def test_best_first_and_no_more_than_asked_for():
    assert closest("q_proj", NAMES, limit=2)[0] == "q_proj"
    assert len(closest("x_proj", NAMES, limit=2)) == 2


def test_equally_close_names_come_in_a_fixed_order():
    assert (
        closest("x_proj", reversed(NAMES), limit=3)
        == closest("x_proj", NAMES, limit=3)
        == ["k_proj", "q_proj", "v_proj"]
    )


def test_no_names_at_all():
    assert closest("q_proj", []) == []
