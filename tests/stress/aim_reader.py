"""Opens an Aim repository as the interface does, and reads all of its runs: `python -m tests.stress.aim_reader`."""

import sys

if __name__ == "__main__":
    from aim import Repo

    for run in Repo.from_path(sys.argv[1]).iter_runs():
        print(run.hash, run.name, len(list(run.metrics())))
