import base64
import json
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.tracking.views import BOOKMARKS, HOST, check_port, main, samples_path, tracked_runs
from tests.committed import ROOT

STORED = "SELECT name, state, type FROM dashboards JOIN explore_states ON dashboards.uuid = dashboard_id"
VISIBLE = f"{STORED} WHERE NOT dashboards.is_archived ORDER BY dashboards.updated_at"


def write(project: Path) -> list[str]:
    """Run the command; a process of its own, for Aim's models are bound to one repository."""
    command = [sys.executable, "-m", "dsv3.tracking.views", "--no-serve", "--params", str(project / "params.yaml")]
    environment = {"PATH": "", "DVC_ROOT": str(project), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def database(project: Path, statement: str, *values: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(project / ".aim" / "aim_db")) as connection, connection:
        return connection.execute(statement, values).fetchall()


def test_the_views_are_bookmarks_of_aim_and_writing_them_twice_makes_no_doubles(project):
    lines = write(project)
    assert [line.partition(": ")[0].strip() for line in lines[1:]] == [
        *(v.name for v in BOOKMARKS),
        "Samples side by side",
    ]
    assert lines[1].endswith(f"http://{HOST}:43800{BOOKMARKS[0].path}")
    assert write(project) == lines
    expected = [(view.name, json.dumps(view.state), view.explorer) for view in BOOKMARKS]
    assert database(project, VISIBLE) == expected


def test_a_view_that_a_user_changed_or_deleted_stays_so_and_so_does_his_own(project):
    write(project)
    changed, deleted, older, *_ = BOOKMARKS
    now = "updated_at = '2030-01-01 00:00:00.000000'"
    database(project, f"UPDATE explore_states SET state = '{{}}', {now} WHERE uuid = ?", changed.id)
    database(project, f"UPDATE dashboards SET is_archived = 1, {now} WHERE uuid = ?", deleted.dashboard_id)
    database(project, "UPDATE explore_states SET state = '{}' WHERE uuid = ?", older.id)
    database(
        project, "INSERT INTO dashboards SELECT 'own', 'Own', '', created_at, updated_at, 0 FROM dashboards LIMIT 1"
    )
    write(project)
    states = {name: state for name, state, _ in database(project, VISIBLE)}
    assert states[changed.name] == "{}"
    assert deleted.name not in states
    assert states[older.name] == json.dumps(older.state)
    assert database(project, "SELECT name FROM dashboards WHERE uuid = 'own'") == [("Own",)]


def test_the_links_state_is_read_as_aim_reads_it():
    states = dict(part.split("=", 1) for part in samples_path().partition("?")[2].split("&"))
    texts = {name: base64.urlsafe_b64decode(f"{text.removeprefix('O-')}===").decode() for name, text in states.items()}
    assert json.loads(texts["query"])["form"]["advancedInput"] == 'texts.name == "sample"'
    assert json.loads(texts["vis1-c-textRenderer"]) == {"type": "code"}
    assert "%" not in "".join(texts.values())  # Aim decodes them


def test_a_repository_that_cannot_be_written_is_one_line(project, monkeypatch):
    locked = project / ".aim/run_metadata.sqlite"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)
    with pytest.raises(UserError, match=r"run_metadata\.sqlite: can't be written; to look at runs, Aim writes too"):
        main(serve=False)


def test_a_mistake_is_one_line(bare_project, params):
    with pytest.raises(UserError, match=r"\.aim: no such folder; no run has been tracked yet, make repro makes one"):
        tracked_runs(params.runtime.model_copy(update={"aim_repo": None}))
    with pytest.raises(UserError, match="aim_repo is aim://host:1; must be a folder"):
        tracked_runs(params.runtime.model_copy(update={"aim_repo": "aim://host:1"}))
    (bare_project / "elsewhere" / ".aim").mkdir(parents=True)
    runtime = params.runtime.model_copy(update={"aim_repo": str(bare_project / "elsewhere")})
    assert tracked_runs(runtime) == bare_project / "elsewhere" / ".aim"
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port is {port}; must be free .*open http://{HOST}:{port}/bookmarks"):
            check_port(port)
    check_port(port)
