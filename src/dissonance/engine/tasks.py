"""Many small trainings as Ray tasks, on any cluster: what `dissonance.engine.processes` is to one machine."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dissonance.engine.pool import RESTARTS, RayOptions, Shared, caught, connect, ray_errors, value_of, workers_of


class TaskPool(ThreadPoolExecutor):
    """An executor whose every call is a Ray task, awaited by a thread; one whose node is lost runs again elsewhere.

    Args:
        options: of the cluster.
        most: pieces of work there are at most.
        folder: what the work reads and writes, and every node must see.

    Raises:
        SettingsError: as `dissonance.engine.ray.RayEngine`.
    """

    def __init__(self, options: RayOptions, most: int, *, folder: Path) -> None:
        import ray

        connect(options.address)
        super().__init__(min(most, workers_of(options)))
        self._shared = Shared.of(folder)
        self._remote = ray.remote(_seeing).options(
            num_cpus=options.cpus, num_gpus=options.gpus, max_retries=RESTARTS, scheduling_strategy="SPREAD"
        )
        self._running: set[Any] = set()
        self._ended = False

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Run it when there is room; what it raises is raised here."""
        return super().submit(self._await, function, *arguments, **named)

    def _await(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        import ray

        task = self._remote.remote(self._shared, function, *arguments, **named)
        self._running.add(task)
        if self._ended:
            ray.cancel(task, force=True)
        try:
            with ray_errors():
                outcome = ray.get(task)
            return value_of(outcome)
        finally:
            self._running.discard(task)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End; with `cancel_futures`, end what runs too."""
        import ray

        super().shutdown(wait=False, cancel_futures=cancel_futures)
        if cancel_futures:
            self._ended = True
            for task in list(self._running):
                ray.cancel(task, force=True)
        super().shutdown(wait=wait)
        self._shared.mark.unlink(missing_ok=True)


def _seeing(shared: Shared, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """On a worker."""
    return caught(shared.check) if not shared.mark.exists() else caught(function, *arguments, **named)
