"""One of the processes that train together: `python -m flows.trainers.worker JOB.json`, started by `crew`."""

from __future__ import annotations

import sys
from pathlib import Path

from apprentice.errors import ApprenticeError
from apprentice.local.base_model import share_processors
from flows.trainers import Progress
from flows.trainers.backends.huggingface import PeftTrainer
from flows.trainers.crew import Together, read_job, report


def main(order: str) -> None:
    """Do this process's part. The first one reports how it goes; whichever fails says so, for it may end the others."""
    share_processors()
    job, every_layer = read_job(Path(order))
    crew = Together()

    def tell(progress: Progress) -> None:
        if crew.rank == 0:
            print(report("progress", progress), flush=True)  # noqa: T201  # the launcher reads it

    try:
        trained = PeftTrainer(every_layer=every_layer).train_part(job, tell, crew)
    except ApprenticeError as error:
        print(report("error", str(error)), flush=True)  # noqa: T201
        raise
    if trained is not None:
        print(report("trained", trained), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
