"""Many small trainings as Ray tasks, on any cluster: what `dissonance.engine.processes` is to one machine."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dissonance.engine.pool import RayOptions, caught, connect, value_of, workers_of


class TaskPool(ThreadPoolExecutor):
    """An executor whose every call is a Ray task, awaited by a thread; one whose node is lost runs again elsewhere.

    Raises:
        SettingsError: as `dissonance.engine.ray.RayEngine`.
    """

    def __init__(self, options: RayOptions, most: int) -> None:
        import ray

        connect(options.address)
        super().__init__(min(most, workers_of(options)))
        self._remote = ray.remote(caught).options(
            num_cpus=options.cpus, num_gpus=options.gpus, max_retries=-1, scheduling_strategy="SPREAD"
        )
        self._running: set[Any] = set()
        self._ended = False

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Run it when there is room; what it raises is raised here."""
        return super().submit(self._await, function, *arguments, **named)

    def _await(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        import ray

        task = self._remote.remote(function, *arguments, **named)
        self._running.add(task)
        if self._ended:
            ray.cancel(task, force=True)
        try:
            return value_of(ray.get(task))
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
