import pytest

from train.tiny_chat import FORGETFUL, NO_STOP, model, tokenizer
from veneer.errors import DataError
from veneer.train.data import Message, Row
from veneer.train.tokens import IGNORED, Example, render_prompt, stop_ids, tokenise

STOP = 2


def row(*contents: str, place: str = "line 1", system: str | None = None) -> Row:
    roles = ("user", "assistant") * len(contents)
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    return Row(tuple([Message("system", system)] if system else []) + tuple(messages), place, plain=True)


def learned(example: Example) -> list[str]:
    """The runs of learned tokens, as text."""
    runs, current = [], []
    for token, label in zip([*example.input_ids, 0], [*example.labels, IGNORED], strict=True):
        if label != IGNORED:
            assert label == token
            current.append(token)
        elif current:
            runs.append(tokenizer().decode(current))
            current = []
    return runs


def only(rows: list[Row], template: str | None = "default", **options) -> Example:
    made = tokenizer() if template == "default" else tokenizer(template)
    tokens = tokenise(rows, made, stops=[STOP], max_length=512, **options)
    (example,) = tokens.examples
    return example


def test_only_the_answer_and_its_stop_token_are_learned() -> None:
    example = only([row("2+2?", "4", system="be brief")])
    assert learned(example) == ["4<|im_end|>"]
    assert example.input_ids[-1] == STOP


def test_the_prompt_is_tokenised_as_it_is_when_the_model_is_used() -> None:
    example = only([row("2+2?", "4")])
    prompt = tokenizer()(render_prompt([Message("user", "2+2?")], tokenizer()))["input_ids"]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert example.labels[len(prompt)] != IGNORED


def test_every_answer_of_a_conversation_is_learned_once() -> None:
    assert learned(only([row("a", "one", "b", "two")])) == ["one<|im_end|>", "two<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_them_an_example_of_their_own() -> None:
    tokens = tokenise([row("a", "one", "b", "two")], tokenizer(FORGETFUL), stops=[STOP], max_length=512)
    assert sorted(run for example in tokens.examples for run in learned(example)) == ["one<|im_end|>", "two<|im_end|>"]
    assert "...<|im_end|>" in tokenizer().decode(tokens.examples[0].input_ids)


def test_a_template_without_a_stop_token_gets_one_at_the_end() -> None:
    assert learned(only([row("a", "one")], NO_STOP)) == ["one <|im_end|>"]


def test_without_a_template_prompt_and_completion_are_running_text() -> None:
    example = only([row("a: ", "one")], None)
    assert learned(example) == ["one<|im_end|>"]
    assert tokenizer().decode(example.input_ids) == "a: one<|im_end|>"


def test_messages_need_a_template() -> None:
    chat = Row((Message("user", "a"), Message("assistant", "b")), "line 1", plain=False)
    with pytest.raises(DataError, match="no chat template"):
        tokenise([chat], tokenizer(None), stops=[STOP], max_length=512)


def test_a_template_that_refuses_a_row_names_it() -> None:
    picky = tokenizer("{{ raise_exception('no system message please') }}")
    with pytest.raises(DataError, match="line 7: the model's chat template refuses .*no system message please"):
        tokenise([row("a", "b", place="line 7")], picky, stops=[STOP], max_length=512)


def test_a_template_that_drops_the_answer_is_an_error() -> None:
    mute = tokenizer("{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="line 7: .*nothing to learn"):
        tokenise([row("a", "b", place="line 7")], mute, stops=[STOP], max_length=512)


LONG = [row("short", "ok", place="line 1"), row("x" * 60, "y" * 10, place="line 2")]


def test_rows_that_are_too_long_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        tokenise(LONG, tokenizer(), stops=[STOP], max_length=80)
    text = str(caught.value)
    assert text.startswith("1 row longer than training.max_length=80 tokens: line 2.")
    whole = len(tokenise([LONG[1]], tokenizer(), stops=[STOP], max_length=999).examples[0].input_ids)
    assert f"training.max_length={whole} keeps all of them whole" in text
    assert "data.too_long=drop" in text


def test_dropped_rows_are_counted() -> None:
    tokens = tokenise(LONG, tokenizer(), stops=[STOP], max_length=80, too_long="drop")
    assert [example.place for example in tokens.examples] == ["line 1"]
    assert tokens.notes() == ["1 row dropped, as longer than training.max_length: line 2"]


def test_dropping_every_row_is_an_error() -> None:
    with pytest.raises(DataError, match="All 1 rows are longer"):
        tokenise(LONG[1:], tokenizer(), stops=[STOP], max_length=80, too_long="drop")


def test_cut_rows_are_counted_and_keep_their_beginning() -> None:
    whole = len(tokenise(LONG, tokenizer(), stops=[STOP], max_length=999).examples[1].input_ids)
    tokens = tokenise(LONG, tokenizer(), stops=[STOP], max_length=whole - 5, too_long="cut")
    assert learned(tokens.examples[0]) == ["ok<|im_end|>"]
    assert learned(tokens.examples[1]) == ["y" * 6]
    assert tokens.notes() == ["1 row cut at training.max_length: line 2"]


def test_a_row_of_which_nothing_to_learn_is_left_is_never_silent() -> None:
    with pytest.raises(DataError, match="nothing to learn would be left: line 2"):
        tokenise(LONG, tokenizer(), stops=[STOP], max_length=60, too_long="cut")


def test_stop_ids_are_the_models_and_the_tokenizers() -> None:
    bare = model()
    bare.generation_config.eos_token_id = [7, 2]
    assert stop_ids(bare, tokenizer()) == [2, 7]


def test_counts() -> None:
    tokens = tokenise([row("a", "one")], tokenizer(), stops=[STOP], max_length=512)
    assert tokens.learned == len("one") + 1
    assert tokens.total == len(tokens.examples[0].input_ids)
