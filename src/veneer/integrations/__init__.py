"""Names and arguments other libraries expect; nothing of LoRA itself lives here."""
