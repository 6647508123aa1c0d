"""Measure on data what an initialisation starts from: EVA, CorDA, LoRA-GA; and LoftQ for a base that is quantised."""
