"""Measuring in other processes: a configuration that hangs, crashes or spoils the GPU's context costs only itself.

A worker is a program that reads a JSON request a line from its input and answers each with a JSON line.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evals.tune_search import Config, Result


class Worker:
    """One worker process, started when it is first needed and again after it has died."""

    def __init__(self, command: Sequence[str], first: dict[str, Any]) -> None:
        """
        Args:
            command: that starts it.
            first: its first request, answered when it is ready.
        """
        self.command = list(command)
        self.first = first
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ready = False

    def start(self) -> None:
        """Start the process, if it is not there, without waiting for it."""
        if self._process is None:
            self._lines = queue.SimpleQueue()
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()
            self._write(self.first)
            self._ready = False

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait; {"failure": why} if the process ends or takes longer than `timeout` seconds."""
        self.send(request)
        return self.answer(timeout)

    def send(self, request: dict[str, Any]) -> None:
        """Send a request, to a process that has been started if necessary."""
        self.start()
        self.wait()
        self._write(request)

    def wait(self) -> None:
        """Wait until a started process is ready."""
        if not self._ready:
            first = self.answer(120.0)
            if "failure" in first:
                raise RuntimeError(f"the measuring process does not start: {first['failure']}")
            self._ready = True

    def _write(self, request: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: `answer` will find out

    def answer(self, timeout: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            return {"failure": f"took more than {timeout:g} s"}
        if not line:
            status = process.wait()
            self.stop()
            return {"failure": f"ended its process, exit status {status}"}
        reply = json.loads(line)
        if reply.get("last"):  # the GPU's context is spoilt, say
            self.stop()
        return reply

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


class Measurer:
    """Measures configurations: compiles and checks several at a time, times one at a time, and logs each at once."""

    def __init__(self, workers: Sequence[Worker], log: Path, about: dict[str, Any], timeout: float) -> None:
        """
        Args:
            workers: the first one also times.
            log: file that gets a JSON line for each result.
            about: what is measured and with what; a result counts again only for the same.
            timeout: seconds that a configuration may take to compile and run, and again to be timed.
        """
        self.workers = list(workers)
        self.log = log
        self.about = about
        self.timeout = timeout

    def start(self) -> None:
        """Start the workers, all at once, and wait until they are ready."""
        for worker in self.workers:
            worker.start()
        for worker in self.workers:
            worker.wait()

    def __call__(self, configs: list[Config]) -> Iterator[Result]:
        for first in range(0, len(configs), len(self.workers)):
            some = configs[first : first + len(self.workers)]
            pairs = list(zip(self.workers, some, strict=False))
            for worker, _ in pairs:
                worker.start()  # those that have died
            for worker, config in pairs:
                worker.send({"check": config})
            deadline = time.monotonic() + self.timeout
            checked = [worker.answer(max(0.1, deadline - time.monotonic())) for worker, _ in pairs]
            for config, reply in zip(some, checked, strict=True):
                if "failure" not in reply:
                    reply = self.workers[0].ask({"time": config}, self.timeout)
                result = Result(config, reply.get("us"), reply.get("failure", ""))
                self.write(result)
                yield result

    def write(self, result: Result) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as file:
            file.write(json.dumps(self.about | {"result": vars(result)}) + "\n")

    def earlier(self) -> list[Result]:
        """What the log already has of the same; the last one of a configuration that was measured twice."""
        if not self.log.exists():
            return []
        found = []
        for line in self.log.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off in the middle of a write
            if {name: entry.get(name) for name in self.about} == json.loads(json.dumps(self.about)):
                found.append(Result(**entry["result"]))
        return found

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
