"""A Python that is warm: it has imported what is slow to import, and a fork of it runs each command in a moment.

Hundreds of commands, many of which start DVC and several stages, would wait many minutes for torch alone. `WarmPython`
starts one process with all of it loaded, and makes a folder of programs (`python`, `dvc` ...) to put first on the path:
each hands its arguments, environment and files to a fork of that process, which runs them as Python itself would.
Only what others wrote is loaded beforehand; the project's own modules come from the folder that a command runs in.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

TRAINING = (
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "transformers",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "accelerate",
    "typer",
    "pydantic",
)
"""What the train stage loads of others."""
PIPELINE = (
    *TRAINING,
    "torch.utils.tensorboard",
    "aim",
    "datasets",
    "matplotlib.pyplot",
    "dvc.cli",
    "dvc.repo.reproduce",
    "dvc.commands.repro",
    "dvc.commands.experiments.run",
    "dvc.cli.parser",
    "dvc.repo.experiments.queue.celery",
    "scmrepo.git",
    "networkx",
    "hydra",
)
"""What all stages and DVC load."""
EXECUTABLE = "WARM_EXECUTABLE"
"""Environment variable: what a program takes for its Python, so that what it starts by that is warm too."""
PROGRAMS = ("python", "dvc", "accelerate", "tensorboard")

CLIENT = """#!{python} -ISE
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
files = array.array("i", [0, 1, 2])
request = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
server.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(request)
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
os._exit(server.recv(1)[0])
"""


class WarmPython:
    """The process and its folder of programs."""

    def __init__(self, folder: Path, environment: Mapping[str, str], modules: Sequence[str] = PIPELINE) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        address = str(folder / "socket")
        for program in PROGRAMS:
            path = self.programs / program
            path.write_text(CLIENT.format(python=sys.executable, address=address, program=program))
            path.chmod(0o755)
        self._process = subprocess.Popen(
            [sys.executable, __file__, address, *modules], cwd=folder, env=dict(environment), start_new_session=True
        )
        deadline = time.monotonic() + 120
        while not Path(address).exists():
            assert self._process.poll() is None and time.monotonic() < deadline, "no warm Python"
            time.sleep(0.05)

    def close(self) -> None:
        """End the process, and what it may have left running."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve(address: str, modules: Sequence[str]) -> None:
    """Answer requests, each in a fork, until the process is killed, or whoever started it is gone."""
    parent = os.getppid()
    for name in modules:
        import_module(name)
    gc.freeze()  # or each fork's collector copies it all
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the forks ended but their clients
    listener.settimeout(5)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            answer(connection)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Run one request in another fork, so that whatever becomes of that, its client learns of it."""
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    size, text = int.from_bytes(head, "big"), b""
    while len(text) < size:
        text += connection.recv(size - len(text))  # what follows are signals
    program, arguments, folder, environment = json.loads(text)
    if (child := os.fork()) == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        end(run, program, arguments)
    threading.Thread(target=pass_on, args=(connection, child), daemon=True).start()
    _, status = os.waitpid(child, 0)
    with suppress(BrokenPipeError):  # a client that was killed
        connection.send(bytes([os.waitstatus_to_exitcode(status) % 256]))
    os._exit(0)


def pass_on(connection: socket.socket, child: int) -> None:
    """Give the child its client's signals; kill it when the client is gone."""
    while number := connection.recv(1):
        os.kill(child, number[0])
    os.kill(child, signal.SIGKILL)


def end(run: Callable[..., None], *arguments: Any) -> None:
    """Run, and end the process without taking down all that was loaded, which takes seconds."""
    status: Any = 0
    try:
        run(*arguments)
    except SystemExit as reason:
        status = reason.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def run(program: str, arguments: Sequence[str]) -> None:
    """Do what `program arguments` does."""
    sys.executable = os.environ.get(EXECUTABLE, sys.executable)
    if arguments[:1] == ["-u"]:
        sys.stdout.reconfigure(write_through=True)
        arguments = arguments[1:]
    if program != "python":
        (entry,) = entry_points(group="console_scripts", name=program)
        sys.argv = [program, *arguments]
        sys.path[0] = str(Path(sys.executable).parent)
        sys.exit(entry.load()())
    if arguments[:2] == ["-m", "pytest"]:  # which rewrites what it imports
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.path[0] = "" if arguments[0] in ("-m", "-c") else str(Path(arguments[0]).resolve().parent)
    if arguments[0] == "-m":
        sys.path[0] = str(Path.cwd())
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
