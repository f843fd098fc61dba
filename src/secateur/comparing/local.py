"""The queue on this machine: as many processes at a time as there are devices, each with one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

import torch

from secateur.comparing.jobs import Job, run_job


def default_workers(device: str) -> int:
    """Number of processes at a time: one per GPU, but one where a device is named or there is none."""
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def run_jobs(jobs: Sequence[Job], workers: int, device: str = "auto") -> Iterator[Job]:
    """Run jobs; yields each when it is over. What still runs when this is left is stopped.

    One worker sees all devices. Several share the GPUs out among them, where no one is named; or the cores.
    """
    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for number in range(workers):
        slots.put(_environment(number, workers, device))
    running: set[subprocess.Popen[str]] = set()
    stop = threading.Event()

    def work(job: Job) -> Job:
        slot = slots.get()
        try:
            run_job(job, slot, running.add, stop.is_set)
        finally:
            slots.put(slot)
        return job

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def _environment(number: int, workers: int, device: str = "auto") -> dict[str, str]:
    """Say to a worker's processes which device is theirs."""
    if workers == 1:
        return {}
    if device in ("auto", "cuda") and torch.cuda.device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = seen.split(",")
        return {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
