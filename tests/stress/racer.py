"""Takes a lock at a given moment, says how that went, and dies holding it: `python -m tests.stress.racer`."""

import os
import signal
import sys
import time
from pathlib import Path

from dsv3.errors import UserError
from dsv3.training.lock import hold_lock


def main(root: Path, start: float, delay: float) -> None:
    """Hold the lock of `root`/run from `start` on for a tenth of a second."""
    mark = root / "held"
    while time.time() < start + delay:
        pass
    try:
        with hold_lock(root / "run"):
            try:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                print("two holders", flush=True)
            print("won", os.getpid(), flush=True)
            time.sleep(0.1)
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    except UserError as error:
        print("lost", error, flush=True)
        os._exit(0)  # the end of a Python that has imported torch takes longer than the race


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
