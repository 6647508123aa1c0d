"""Fine-tuning from a run file: data in, adapter folder out. A thin layer over TRL's SFTTrainer.

    settings.py   what a run can be told: sections, keys, types, ranges and defaults
    run_file.py   run.yaml and the settings laid over it, read and checked; setting_problems.py says what is wrong
    template.py   the commented run.yaml that `veneer init` writes
    data.py       rows of a .json or .jsonl file, every problem named by its line; row_check.py looks at one row
    sets.py       rows to train on and to evaluate on, as tokens that the model can read
    tokens.py     rows to token ids and labels: what is learned and what is only read
    trainer.py    SFTTrainer with our loss, our order of rows, our resume and no telemetry
    loss.py       cross-entropy of the learned tokens alone
    order.py      rows of similar length in one step
    schedule.py   the learning rate of each step
    quantisation.py  a base in 8 or 4 bits
    ranks.py      the processes of a run: what they agree on, and how they end together
    gathered.py   whole values of what lies in shards
    launch.py     processes for several devices, through accelerate; profiles/ are its config files
    estimate.py   memory and traffic by arithmetic
    build.py      a trainer from settings
    run.py        settings to an adapter folder
    finish.py     what a run leaves behind
    resume.py     going on with a run that was stopped, or refusing to
    watch.py      Trainer callbacks: the log file, the progress display
    progress.py   what the terminal shows meanwhile
    plot.py       loss.png
    folders.py    what a command may write over, and what it was given in place of a model
    quiet.py      other libraries' progress bars and log lines, put away for a while
    generate.py   batched greedy answers
    scoring.py    how well JSON answers agree with the expected ones
    small_model.py  a small pretrained model out of a package, converted once
    demo.py       before, training, after; demo_view.py shows it, demo_picture.py draws it

Nothing is imported here: each module loads torch and transformers only when it runs.
"""
