"""A small server inside a process: one thread, batches of whatever waits, a budget that may follow the queue."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from acmize.errors import AcmizeError
from acmize.serve.controller import BudgetController


class Answer(Future[Tensor]):
    """Future of a request: `arrived` on the server's clock; once done, its `latency` in seconds and its `budget`."""

    arrived: float
    latency: float | None = None
    budget: float | None = None


class Server:
    """Answers samples in batches of whatever waits, in the order in which they came.

    It owns the model: nothing else may run it or set its budget meanwhile, and the budget stays where it was last set.
    An error of the model reaches every request of its batch. As a context manager it ends when all are answered; if the
    block raises, those that wait are cancelled.

    Args:
        model: (B, ...) to (B, ...), in eval mode: adaptive, dense, or any callable.
        controller: sets the model's budget before each batch; None leaves it alone.
        max_batch: samples in a batch at most; only those of one shape and dtype go together.
        clock: seconds, never falling.
        threaded: whether a thread serves; otherwise `step`, `flush` and `close` do, where they are called.

    Raises:
        AcmizeError: a model in training mode, or one that lacks the budgets of the controller.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        controller: BudgetController | None = None,
        *,
        max_batch: int = 8,
        clock: Callable[[], float] = time.perf_counter,
        threaded: bool = True,
    ) -> None:
        if max_batch < 1:
            raise AcmizeError(f"max_batch: found {max_batch}, expected at least 1; make it larger")
        if getattr(model, "training", False):
            raise AcmizeError("model: found training mode, expected eval mode; call model.eval() first")
        if controller is not None and not hasattr(model, "set_budget"):
            raise AcmizeError(f"model: found {type(model).__name__}, expected set_budget; leave the controller out")
        self.model: Any = model
        self.controller, self.max_batch, self.clock = controller, max_batch, clock
        if controller is not None:
            self.model.set_budget(controller.config.low)  # out of reach: said now, not by every request
        weight = next(iter(self.model.parameters()), None) if hasattr(model, "parameters") else None
        self._device = None if weight is None else weight.device
        self._waiting: deque[tuple[Tensor, Answer]] = deque()
        self._finished: list[float] = []
        self._busy = self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, daemon=True) if threaded else None
        if self._worker is not None:
            self._worker.start()

    def submit(self, x: Tensor, *, arrived: float | None = None) -> Answer:
        """Ask for the output of a sample (no batch dimension) that arrived now, or then on the server's clock.

        Raises:
            AcmizeError: not a tensor, or the server is closed.
        """
        if not isinstance(x, Tensor):
            raise AcmizeError(f"request: found {type(x).__name__}, expected the tensor of a sample; convert it first")
        answer = Answer()
        answer.arrived = self.clock() if arrived is None else arrived
        with self._changed:
            if self._closed:
                raise AcmizeError("server: found it closed, expected it open; submit inside its `with` block")
            self._waiting.append((x, answer))
            self._changed.notify_all()
        return answer

    def step(self) -> None:
        """Serve one batch here, where no thread does."""
        with self._changed:
            self._busy, batch = True, []
            while self._waiting and len(batch) < self.max_batch:
                x, answer = self._waiting[0]
                if batch and (x.shape, x.dtype) != (batch[0][0].shape, batch[0][0].dtype):
                    break
                self._waiting.popleft()
                if answer.set_running_or_notify_cancel():
                    batch.append((x, answer))
            left = len(self._waiting)
        if batch:
            self._serve([x for x, _ in batch], [answer for _, answer in batch], left)
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _serve(self, xs: list[Tensor], answers: list[Answer], left: int) -> None:
        budget, outs, error = getattr(self.model, "budget", None), [], None
        try:
            if self.controller is not None:
                oldest = self.clock() - min(answer.arrived for answer in answers)
                budget = self.controller.decide(waiting=left, oldest=oldest, finished=self._finished)
                self.model.set_budget(budget)
            with torch.inference_mode():
                outs = self.model(torch.stack(xs).to(self._device)).cpu()  # which waits for the device
            if len(outs) != len(xs):
                raise AcmizeError(f"model: found {len(outs)} outputs, expected {len(xs)}, one a sample; wrap the model")
        except BaseException as caught:  # any kind: whoever waits must hear of it
            error = caught
        now = self.clock()
        self._finished = [now - answer.arrived for answer in answers]
        for number, (answer, latency) in enumerate(zip(answers, self._finished, strict=True)):
            answer.latency, answer.budget = latency, budget
            if error is None:
                answer.set_result(outs[number])
            else:
                answer.set_exception(error)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
            self.step()

    def flush(self) -> None:
        """Return when everything submitted has been answered."""
        while self._worker is None and self._waiting:
            self.step()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests; return when those that wait are answered, or cancelled. May be called again."""
        with self._changed:
            self._closed = True
            for _, answer in self._waiting if cancel else ():
                answer.cancel()
            self._changed.notify_all()
        self.flush()
        if self._worker is not None:
            self._worker.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(cancel=kind is not None)
