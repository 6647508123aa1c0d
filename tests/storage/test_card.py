"""README.md: what is ours in it is renewed, and nothing else."""

import pytest
import yaml
from huggingface_hub import ModelCard

from veneer.storage.card import MAX_CARD_BYTES, may_be_written, read_card, section, updated, with_metadata

ORDER = ("adapter", "training", "scores", "use")
WANTED = {"base_model": "a/b", "library_name": "peft", "tags": ["lora", "veneer"]}


def card(*sections: str) -> str:
    return with_metadata("# Title\n\nMine\n\n" + "\nbetween\n\n".join(sections) + "\nafter\n", WANTED)


def renewed(text: str, of: str | None = None, **sections: str) -> str:
    made = {name: section(name, body, of=of if name in ("training", "scores") else None)
            for name, body in sections.items()}  # fmt: skip
    return updated(text, WANTED, made, of=of, order=ORDER)


def test_a_section_is_renewed_and_all_around_it_stays():
    before = card(section("adapter", "old"), section("use", "old use"))
    after = renewed(before, adapter="new")
    assert after == before.replace("\nold\n", "\nnew\n")


def test_doing_it_again_changes_nothing():
    once = renewed(card(section("adapter", "x"), section("use", "y")), of="11", adapter="x", training="t", use="y")
    assert renewed(once, of="11", adapter="x", training="t", use="y") == once


def test_a_new_section_comes_in_its_place():
    after = renewed(card(section("adapter", "a"), section("use", "u")), of="11", training="t")
    after = renewed(after, of="11", scores="s")
    places = [after.index(f"<!-- veneer:{name}") for name in ORDER]
    assert places == sorted(places)
    assert after.count("between") == after.count("after") == 1


def test_what_was_said_of_other_weights_goes():
    before = card(section("adapter", "a"), section("training", "t", of="11"), section("use", "u"))
    assert "\nt\n" in renewed(before, of="11", adapter="a")
    after = renewed(before, of="22", adapter="a")
    assert "\nt\n" not in after
    assert "veneer:training" not in after


def test_a_section_that_was_taken_out_stays_out():
    assert "veneer:use" not in renewed(card(section("adapter", "a")), use="u", adapter="b")


@pytest.mark.parametrize(
    "text", ["# Mine\n", "# Mine\r\n\r\nwith \\ and `x`\r\n", "", "---\n\n# A rule, no metadata\n"]
)
def test_a_card_of_somebody_else_keeps_its_text(text):
    after = renewed(text, adapter="ours")
    assert after.endswith(text)
    assert ModelCard(after).data.to_dict() == WANTED


def test_metadata_that_is_there_stays():
    mine = "---\nlicense: mit\nbase_model: [x/y]\ntags: poetry\n# a comment\nlibrary_name: transformers\n---\ntext"
    after = with_metadata(mine, WANTED, ours=False)
    found = ModelCard(after).data.to_dict()
    assert found == {
        "license": "mit",
        "base_model": ["x/y"],
        "library_name": "peft",
        "tags": ["poetry", "lora", "veneer"],
    }
    assert after.endswith("---\ntext")
    assert ModelCard(with_metadata(mine, WANTED, ours=True)).data.base_model == "a/b"


def test_complete_metadata_keeps_every_byte():
    whole = "---\n# a comment\ntags: [veneer,   lora]\nlibrary_name:   peft\nbase_model: x/y\n---\ntext"
    assert with_metadata(whole, WANTED, ours=False) == whole


@pytest.mark.parametrize("broken", ["---\na: [1\n---\ntext", "---\n- a list\n---\n", "---\nd: 2026-13-01\n---\n"])
def test_metadata_that_cannot_be_read_is_left_alone(broken):
    assert with_metadata(broken, WANTED) == broken


def test_a_byte_order_mark_does_not_hide_the_metadata():
    after = with_metadata("\ufeff---\nlicense: mit\n---\ntext", WANTED)
    assert after.count("---\n") == 2
    assert yaml.safe_load(after.split("---")[1])["license"] == "mit"


def test_windows_line_ends_are_read():
    before = card(section("adapter", "old")).replace("\n", "\r\n")
    after = renewed(before, adapter="new")
    assert "new" in after
    assert "old" not in after
    assert after.count("library_name") == 1


def test_what_is_no_text_or_a_link_is_not_touched(tmp_path):
    assert may_be_written(tmp_path)
    file = tmp_path / "README.md"
    for content in (b"\xff\xfe\x00", b"x" * (MAX_CARD_BYTES + 1)):
        file.write_bytes(content)
        assert not may_be_written(tmp_path)
        assert read_card(tmp_path) is None
    file.unlink()
    (tmp_path / "elsewhere").write_text("secret")
    file.symlink_to(tmp_path / "elsewhere")
    assert not may_be_written(tmp_path)
