"""Other libraries' progress bars and log lines, put away for a while and restored afterwards."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("transformers", "trl", "datasets", "accelerate", "huggingface_hub", "torch", "bitsandbytes")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines below ERROR of the libraries we build on, inside the block."""
    import datasets
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars = transformers_logging.is_progress_bar_enabled()
    data_bars = datasets.is_progress_bar_enabled()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()
