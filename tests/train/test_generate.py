from train.tiny_chat import model, tokenizer
from veneer.train.data import Message
from veneer.train.generate import answer
from veneer.train.tokens import render_prompt

QUESTIONS = [[Message("user", text)] for text in ("hi", "a much longer question than the others", "why")]


def test_a_batch_gives_what_one_at_a_time_gives() -> None:
    bare, tok = model(), tokenizer()
    one_by_one = [answer(bare, tok, [question], max_new_tokens=12)[0] for question in QUESTIONS]
    assert answer(bare, tok, QUESTIONS, max_new_tokens=12, batch_size=3) == one_by_one
    assert answer(bare, tok, QUESTIONS, max_new_tokens=12, batch_size=2) == one_by_one
    assert len(set(one_by_one)) > 1


def test_an_answer_ends_at_the_stop_token() -> None:
    bare, tok = model(), tokenizer()
    prompt = tok(render_prompt(QUESTIONS[0], tok), return_tensors="pt")
    ids = bare.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    first_stop = ids.index(ids[-1])
    bare.generation_config.eos_token_id = ids[-1]
    new = answer(bare, tok, QUESTIONS[:1], max_new_tokens=50)[0]
    assert new == tok.decode(ids[: first_stop + 1], skip_special_tokens=True)


def test_progress_is_told_and_the_tokenizer_left_alone() -> None:
    told: list[tuple[int, int]] = []
    tok = tokenizer()
    side = tok.padding_side
    answer(model(), tok, QUESTIONS, max_new_tokens=1, batch_size=2, on_batch=lambda done, of: told.append((done, of)))
    assert told == [(2, 3), (3, 3)]
    assert tok.padding_side == side
