"""Fine-tuning from a run file: data in, adapter folder out. A thin layer over TRL's SFTTrainer.

    settings.py   run.yaml: what it may say, read and checked
    template.py   the commented run.yaml that `veneer init` writes
    data.py       rows of a .json or .jsonl file, every problem named by its line
    tokens.py     rows to token ids and labels: what is learned and what is only read
    trainer.py    SFTTrainer with our loss, our resume and no telemetry
    run.py        settings to an adapter folder
    watch.py      Trainer callbacks: the log file, the finite check, the progress display
    progress.py   what the terminal shows meanwhile
    plot.py       loss.png
    folders.py    folders that are complete or absent
    quiet.py      other libraries' progress bars and log lines, put away for a while
    generate.py   batched greedy answers
    scoring.py    how well JSON answers agree with the expected ones
    small_model.py  a small pretrained model out of a package, converted once
    demo.py       before, training, after; demo_view.py shows it, demo_picture.py draws it

Nothing is imported here: each module loads torch and transformers only when it runs.
"""
