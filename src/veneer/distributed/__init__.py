"""Many processes: what a model spread over several devices needs."""
