"""Run by torchrun: `veneer train FILE` in which process 1 fails in its fourth step. train_fails.py memory|kill FILE"""

import os
import signal
import sys

from veneer.cli import main
from veneer.train import trainer


class Failing(trainer.VeneerSFTTrainer):
    """Out of memory, or killed, in the fourth step of process 1."""

    def compute_loss(self, *args, **kwargs):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == "1" and self.state.global_step == 3:
            if sys.argv[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("not enough memory")
        return super().compute_loss(*args, **kwargs)


trainer.VeneerSFTTrainer = Failing
main(["train", sys.argv[2]])
