"""The queue on a Ray cluster; the only file that imports Ray (the extra `ray`).

Every node needs this package and the study's folder under the same path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray

from secateur.experiments.queue import CellGroup, run_group
from secateur.experiments.state import CELLS, State


def run_groups(groups: Sequence[CellGroup], workers: int | None, address: str | None = None) -> Iterator[CellGroup]:
    """Run groups on a cluster, or on one started here; yield each when it is done.

    Args:
        groups: the groups to run.
        workers: number of groups at a time; None leaves it to the cluster: one per GPU, or per core if it has none.
        address: of the cluster (`auto` finds the one this machine belongs to); None starts one here.
    """
    ray.init(
        address=address, num_cpus=workers if address is None else None, log_to_driver=False, include_dashboard=False
    )
    try:
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        remote = ray.remote(run_group).options(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)
        waiting = list(groups)
        running: dict[ray.ObjectRef, CellGroup] = {}
        while waiting or running:
            while waiting and (workers is None or len(running) < workers):
                group = waiting.pop(0)
                running[remote.remote(group, {})] = group
            (done, *_), _ = ray.wait(list(running))
            group = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                _note_loss(group, error)
            yield group
    finally:
        ray.shutdown()


def _note_loss(group: CellGroup, error: Exception) -> None:
    """Record that the worker of a group was lost; a cell that had finished is found when the study is run again."""
    for name in group.cells:
        state = State.of(group.study / CELLS / name)
        if state.failed is None:
            state.fail("process", error)
