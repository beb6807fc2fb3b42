"""Processes that stay up over a session's tests, connected by gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from td3_fast.parallel import join

SECONDS = 300


def serve(connection: Connection, rank: int, size: int, meeting: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with join(init_method=f"file://{meeting}", rank=rank, size=size) as ranks:
        while (task := connection.recv()) is not None:
            function, arguments = task
            torch.manual_seed(0)
            try:
                # plain pickles: those of torch.multiprocessing share a tensor's memory with a process that may be gone
                answer = pickle.dumps((True, function(ranks.everyone, *arguments)))
            except Exception:
                answer = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(answer)


class Processes:
    """Calls `function(group, *arguments)`, a module's own function, in every process; gives what each returned."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.size = size
        self._connections = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, rank, size, str(folder / "meeting")))
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for connection in self._connections:
            connection.send((function, arguments))
        results = []
        for rank, connection in enumerate(self._connections):
            assert connection.poll(SECONDS), f"process {rank} did not answer in {SECONDS} s"
            done, result = pickle.loads(connection.recv_bytes())
            assert done, f"process {rank}:\n{result}"
            results.append(result)
        return results

    def stop(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
