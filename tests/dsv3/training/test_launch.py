import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dsv3.training import launch


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        ({1: 2, 0: -15}, 2),  # a mistake in the second worker; the first was told to stop
        ({0: 2, 1: -15}, 2),
        ({1: -9, 0: 143}, 137),  # the second was killed for its memory; the first saved and went
    ],
)
def test_the_status_is_that_of_the_worker_that_failed_first(statuses, told, monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        failures = {
            rank: ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file=str(tmp_path / "none"))
            for rank, status in statuses.items()
        }
        raise ChildFailedError("train", failures)

    monkeypatch.setattr(launch, "elastic_launch", lambda *_: fail)
    with pytest.raises(SystemExit) as stopped:
        launch.run_workers(2, "stages.train", [])
    assert stopped.value.code == told
