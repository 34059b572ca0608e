"""soar-mega for tests: the steps of a run that starts at the beginning take PACE_SECONDS longer, so that a signal finds
it at work; a resumed run is as fast as it can be. Started as `paced -m soar_mega ...` in the place of python.
"""

import os
import sys
import time

if __name__ == "__main__":
    from soar_mega.faults.signals import StopRequest
    from soar_mega.training.run import Trainer

    step, run_steps = Trainer.step, Trainer.run_steps

    def paced_step(self: Trainer) -> float:
        time.sleep(float(os.environ["PACE_SECONDS"]))
        return step(self)

    def run_paced(self: Trainer, stop: StopRequest) -> int:
        if self.progress.iteration == 0:
            Trainer.step = paced_step  # type: ignore[method-assign]
        return run_steps(self, stop)

    Trainer.run_steps = run_paced  # type: ignore[method-assign]

    from soar_mega.cli import main

    assert sys.argv[1:3] == ["-m", "soar_mega"]
    sys.exit(main(sys.argv[3:]))
