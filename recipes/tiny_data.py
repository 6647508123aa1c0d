"""Pictures and sounds made on the spot, in the columns that the real data sets have: what `--tiny` trains on."""

import numpy as np
from datasets import Dataset
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}
TONES = {"one": 300.0, "two": 600.0, "three": 1200.0}
RATE = 16_000


def pictures(count: int, seed: int = 0) -> Dataset:
    """`image` and `labels`: noisy squares of three colours."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(COLOURS), count)
    colours = np.array(list(COLOURS.values()))[labels]
    noisy = np.clip(colours[:, None, None, :] + random.normal(0, 40, (count, 16, 16, 3)), 0, 255).astype(np.uint8)
    return Dataset.from_dict({"image": [Image.fromarray(each) for each in noisy], "labels": labels.tolist()})


def speech(count: int, seed: int = 0) -> list[dict]:
    """`audio` (with `array` and `sampling_rate`) and `text`: one of three tones for a second, and the word it means."""
    random = np.random.default_rng(seed)
    words = random.choice(list(TONES), count)
    time = np.arange(RATE) / RATE
    sounds = [np.sin(2 * np.pi * TONES[word] * time) + random.normal(0, 0.05, RATE) for word in words]
    return [
        {"audio": {"array": sound.astype(np.float32), "sampling_rate": RATE}, "text": str(word)}
        for word, sound in zip(words, sounds, strict=True)
    ]
