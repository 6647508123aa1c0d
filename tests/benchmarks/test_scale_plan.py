"""The pages of large models and of quantised bases say what the arithmetic and the records say."""

from benchmarks.quantised_memory import PAGE as QUANTISED
from benchmarks.quantised_memory import with_table
from benchmarks.scale_plan import MODELS, PAGE, compute_seconds, run_of, tables, with_tables


def test_the_page_of_large_models_is_what_is_computed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert tables() in page
    assert with_tables(page) == page


def test_the_page_of_quantised_bases_is_what_was_measured() -> None:
    page = QUANTISED.read_text(encoding="utf-8")
    assert with_table(page) == page


def test_computing_takes_longer_for_larger_models() -> None:
    seconds = [compute_seconds(run_of(shape)) for shape in MODELS]
    assert seconds == sorted(seconds)
