"""Teach Whisper a way of speaking: LoRA on speech recognition.

Model  whisper-small, or any other Whisper
Data   any set with `audio` and `text`; by default the 73 read sentences of librispeech_asr_dummy
Time   some minutes on a GPU; seconds with --tiny (a tiny random model, three tones that mean one, two, three)

No task type here: SEQ_2_SEQ_LM would expect token ids at the input, and Whisper listens.
"""

import argparse
import json
from typing import Any

import tiny_data
import tiny_models
from datasets import Audio, load_dataset
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from veneer import LoraConfig, get_peft_model


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train and save. Returns what was counted and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/whisper-small")
    parser.add_argument("--data", default="hf-internal-testing/librispeech_asr_dummy")
    parser.add_argument("--output", default="adapters/speech_recognition")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, offline, in seconds")
    options = parser.parse_args(arguments)
    set_seed(0)
    if options.tiny:
        options.model, options.learning_rate, rows = tiny_models.speech(), 2e-2, tiny_data.speech(40)
    else:
        rows = list(load_dataset(options.data, split="validation").cast_column("audio", Audio(sampling_rate=16_000)))

    processor = AutoProcessor.from_pretrained(options.model)
    processor.tokenizer.set_prefix_tokens(language="english", task="transcribe")
    base = AutoModelForSpeechSeq2Seq.from_pretrained(options.model)
    config = LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        sounds = [row["audio"]["array"] for row in batch]
        heard = processor(audio=sounds, sampling_rate=16_000, return_tensors="pt")
        written = processor.tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
        labels = written.input_ids.masked_fill(written.attention_mask == 0, -100)
        # the model puts the first token there itself
        return {"input_features": heard.input_features, "labels": labels[:, 1:]}

    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir=f"{options.output}/run",
            num_train_epochs=4,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=8,
            remove_unused_columns=False,  # `audio` is read by collate, not by the model
            label_names=["labels"],
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows[8:],
        eval_dataset=rows[:8],
        data_collator=collate,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before, f"The loss on unseen speech went from {before:.3f} to {after:.3f}."

    heard = collate(rows[:1])["input_features"].to(model.device)
    written = model.generate(input_features=heard, max_new_tokens=16)
    print(f"{rows[0]['text']!r} was heard as {processor.decode(written[0], skip_special_tokens=True)!r}")
    model.save_pretrained(options.output)
    trained, total = model.get_nb_trainable_parameters()
    return {"trainable": trained, "total": total, "loss_before": before, "loss_after": after}


if __name__ == "__main__":
    print(json.dumps(main()))
