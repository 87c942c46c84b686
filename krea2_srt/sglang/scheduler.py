"""SGLang's diffusion scheduler with our engine in its loop.

Everything around the loop is SGLang's: the channel, control requests, how results are saved and
sent, metrics. For a model that our pipeline does not serve, the loop is SGLang's too.
"""

import gc
import logging
import os
import pickle
import signal
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from sglang.multimodal_gen.runtime.entrypoints.control_requests import ShutdownReq
from sglang.multimodal_gen.runtime.entrypoints.post_training.io_struct import (
    ReleaseMemoryOccupationReqInput,
)
from sglang.multimodal_gen.runtime.managers.scheduler import Scheduler
from sglang.multimodal_gen.runtime.pipelines_core import Req
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

from krea2_srt.engine.engine import Engine
from krea2_srt.engine.events import Ended, Event, Progress, Started
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.engine.turn_log import TurnLog
from krea2_srt.errors import DrainingError, Krea2Error, ModelError, RequestError
from krea2_srt.messages import (
    VERSION,
    Accepted,
    Cancel,
    ControlReply,
    ControlRequest,
    GenerateRequest,
    GetModel,
    GetStatistics,
    ModelInfo,
)
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.runner.calibration import cached_calibration
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.sglang.client_monitor import WatchedRouter, events_in_order
from krea2_srt.sglang.compat import check_group
from krea2_srt.sglang.native_exchange import NativeExchange
from krea2_srt.sglang.pipeline import Krea2RunnerPipeline
from krea2_srt.sglang.progress import Subscriptions, report_to_sglang
from krea2_srt.sglang.replies import (
    ReplyThreads,
    SglangExchange,
    engine_error,
    failed,
    finished,
    summary,
)
from krea2_srt.sglang.requests import check_envelope, image_requests
from krea2_srt.sglang.served import serves_krea2

logger = init_logger(__name__)

# SGLang's merging of whole requests.
_WITHOUT_EFFECT = (
    "batching_max_size",
    "batching_delay_ms",
    "batching_mode",
    "batching_config",
    "enable_batching_metrics",
)

_MAX_REPLIES = 64
"""Replies whose pictures are being saved, beyond which no further work is begun."""

_IDLE_WAIT_S = 1.0
_DECODE_POLL_S = 0.001
_LINGER_MS = 1000


class Krea2Scheduler(Scheduler):
    """Takes its class's place in SGLang's worker processes; see `krea2_srt.plugin`."""

    receiver: Any
    _inflight_finalizes: "deque[Future[None]]"

    def __init__(self, server_args: Any, *args: Any, port_args: Any, **kwargs: Any) -> None:
        alone = server_args.num_gpus == 1 and serves_krea2(server_args)
        if alone and not server_args.is_arg_explicitly_set("master_port"):
            # Any, chosen as it is taken: in a process group of one, none else must know it. SGLang
            # looks for a free one from 30005 on and takes it when all is imported: two servers
            # that start within those seconds choose the same one, and the second ends.
            port_args = replace(port_args, master_port=0)
        super().__init__(server_args, *args, port_args=port_args, **kwargs)
        pipeline = self.worker.pipeline
        self._ours = isinstance(pipeline, Krea2RunnerPipeline) and self.receiver is not None
        if not self._ours:
            return
        for option in _WITHOUT_EFFECT:
            if self.server_args.is_arg_explicitly_set(option):
                flag = f"--{option.replace('_', '-')}"
                logger.warning("krea2-srt: %s has no effect: packs are made step by step", flag)
        runner = pipeline.runner
        self._executor = RunnerExecutor(
            runner,
            pipeline.tile,
            runner.side_stream,
            pipeline.plan.overlapped_decodes if pipeline.plan else 1,
        )
        config = pipeline.engine_config
        with runner.on_stream():
            cost = cached_calibration(runner, f"{self.server_args.model_path} {pipeline.speed}")
        self._turn_log = self._open_turn_log(config.turn_log)
        self._engine = Engine(self._executor, cost, config, turn_log=self._turn_log)
        logger.info(
            "krea2-srt: step scheduler, policy %s; one step takes about %.3g ms at 256x256, "
            "%.3g ms at 1024x1024",
            config.policy,
            cost.step([300]),
            cost.step([4160]),
        )
        self._limits = config.limits
        self._max_turn_ms = config.max_turn_ms
        self.receiver = WatchedRouter(self.receiver)
        self._exchanges: dict[Request, SglangExchange | NativeExchange] = {}
        self._subscriptions = Subscriptions(self._executor, self._send)
        self._numbers = count()
        self._replies = ReplyThreads(self.worker, self._reply)
        self.request_handlers |= {
            ShutdownReq: self._drain,
            Cancel: self._cancel,
            GetStatistics: self._statistics,
            GetModel: self._model,
        }
        quantized = f"+{runner.dit.quantization.name}" if runner.dit.quantization else ""
        self._model_info = ModelInfo(
            self.server_args.model_path,
            runner.sampling.distilled,
            runner.sampling.default_steps,
            runner.sampling.default_guidance,
            config.limits,
            str(runner.device),
            str(runner.dit.dtype).removeprefix("torch.") + quantized,
            pipeline.attention,
            runner.sampling.trained_side,
        )

    @property
    def context(self) -> Any:
        """ZeroMQ's. SGLang's constructor sets it, and binds the receiver in the next line."""
        return self._context

    @context.setter
    def context(self, context: Any) -> None:
        events_in_order(context)
        self._context = context

    def event_loop(self) -> None:
        """Receive, take a turn, reply; until shut down and empty."""
        if not self._ours:
            super().event_loop()
            return
        signal.signal(signal.SIGTERM, lambda *_: self._engine.drain())
        self.worker.defer_cache_release = True
        # What the start left will stay: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        try:
            while not self._finished():
                self._receive()
                self._cancel_lost()
                if (events := self._turn()) is not None:
                    self._handle(events)
                if not self._subscriptions.render(self._max_turn_ms) and events is None:
                    self._rest()
        finally:
            self._stop()

    def _turn(self) -> list[Event] | None:
        if self.worker.is_sleeping():
            # The weights are away: what is in the engine waits for them.
            return self._engine.expire() or None
        self._reap_finalizes()
        if len(self._inflight_finalizes) >= _MAX_REPLIES:
            return None
        return self._engine.turn()

    def _finished(self) -> bool:
        # Nobody wakes an engine that shuts down.
        return self._engine.draining and (self._engine.idle or self.worker.is_sleeping())

    def _open_turn_log(self, path: str) -> TurnLog | None:
        if not path:
            return None
        runner = self.worker.pipeline.runner
        flops_per_token, flops_per_square = step_flops(runner.dit.config, [1])
        header = {
            "device": str(runner.device),
            "replica": self.dp_replica,
            "flops_per_token": flops_per_token,
            "flops_per_squared_token": flops_per_square,
            "weight_bytes": step_weight_bytes(runner.dit.config) * runner.dit.dtype.itemsize,
        }
        # One file for each replica.
        file = Path(path if not self.dp_replica else f"{path}.{self.dp_replica}")
        return TurnLog(file, header)

    # Receiving.

    def _receive(self) -> None:
        received = self.recv_reqs()
        for identity, payload in self.process_received_reqs_with_req_based_warmup(received):
            try:
                self._accept(identity, payload)
            except Exception as error:
                # Nothing that a client sends may end the loop.
                logger.error("krea2-srt: a message failed: %s", error, exc_info=True)
                self._reply_failure(identity, payload, error)

    def _reply_failure(self, identity: bytes, payload: Any, error: Exception) -> None:
        match payload:
            case GenerateRequest():
                reply = NativeExchange(identity, payload).failed(error)
                self._send(identity, pickle.dumps(reply))
            case ControlRequest(control_id):
                self._send(identity, pickle.dumps(ControlReply(control_id, error=str(error))))
            case _:
                self._reply(SglangExchange(identity, payload), OutputBatch(error=str(error)))

    def _accept(self, identity: bytes, payload: Any) -> None:
        reqs = payload if isinstance(payload, list) else [payload]
        if reqs and all(isinstance(req, Req) for req in reqs):
            exchange = SglangExchange(identity, payload, tuple(reqs))
            if self.metrics is not None:
                self.metrics.enqueue(id(payload), is_warmup=reqs[0].is_warmup, now=exchange.arrival)
            self._submit(exchange)
            return
        match payload:
            case GenerateRequest():
                self._submit_native(NativeExchange(identity, payload))
            case ControlRequest():
                self._reply_control(identity, payload)
            case _ if (error := _wrong_version(payload)) is not None:
                self._reply(SglangExchange(identity, payload), OutputBatch(error=error))
            case _:
                if isinstance(payload, ReleaseMemoryOccupationReqInput):
                    # Before SGLang moves the weights and empties the allocator's cache.
                    self._executor.release_memory()
                self._reply(
                    SglangExchange(identity, payload), self._dispatch_single_request(payload)
                )
                if self.worker.is_sleeping():
                    # The weights have moved, and graphs would read where they were.
                    self._executor.release_graphs()

    def _submit(self, exchange: SglangExchange) -> None:
        if self.worker.is_sleeping():
            error = "Server is sleeping. Call resume_memory_occupation first."
            self._reply(exchange, OutputBatch(error=error))
            return
        try:
            for req in exchange.reqs:
                check_envelope(req)
            images = [image_requests(req, self._limits) for req in exchange.reqs]
            if any(req.profile for req in exchange.reqs):
                self._run_profiled(exchange)
                return
            check_group(self.worker, exchange.reqs)
            request = self._engine.submit(
                f"{exchange.request_id}#{next(self._numbers)}",
                [image for some in images for image in some],
            )
        except (Krea2Error, ValueError) as error:
            logger.warning("krea2-srt: request %s refused: %s", exchange.request_id, error)
            self._reply(exchange, failed(exchange, error))
            return
        self._exchanges[request] = replace(exchange, counts=tuple(map(len, images)))
        report_to_sglang(exchange, request)
        for req in exchange.reqs:
            req.log(server_args=self.server_args)

    def _submit_native(self, exchange: NativeExchange) -> None:
        message = exchange.message
        try:
            exchange.check()
            if self.worker.is_sleeping():
                raise DrainingError("the engine is asleep")
            request = self._engine.submit(
                f"{exchange.request_id}#{next(self._numbers)}",
                [message.image],
                message.priority,
                message.deadline_s,
            )
        except Krea2Error as error:
            logger.warning("krea2-srt: request %s refused: %s", exchange.request_id, error)
            self._send(exchange.identity, pickle.dumps(exchange.failed(error)))
            return
        self._exchanges[request] = exchange
        if message.progress:
            self._send(exchange.identity, pickle.dumps(Accepted(exchange.request_id)))
            self._subscriptions.add(exchange.identity, message, request)

    def _run_profiled(self, exchange: SglangExchange) -> None:
        """SGLang's profiler covers a request from end to end: it has the engine to itself."""
        if not self._engine.idle or self._engine.draining:
            raise RequestError("profile", "is only possible while nothing else is in the engine")
        with self.worker.pipeline.runner.on_stream():
            self._reply(exchange, self.worker.execute_forward(list(exchange.reqs)))

    def _requests_of(self, request_id: str) -> list[Request]:
        return [r for r, exchange in self._exchanges.items() if exchange.request_id == request_id]

    # Turning events into replies.

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            try:
                self._dispatch_event(event)
            except Exception:
                # Whatever a client has put into its request, the others go on.
                logger.exception("krea2-srt: %s could not be handled", type(event).__name__)

    def _dispatch_event(self, event: Event) -> None:
        match event:
            case Started(request):
                exchange = self._exchanges[request]
                if self.metrics is not None and isinstance(exchange, SglangExchange):
                    self.metrics.dispatch(id(exchange.payload))
            case Progress(sequence):
                self._subscriptions.step(event)
                exchange = self._exchanges[sequence.request]
                if isinstance(exchange, SglangExchange):
                    report_to_sglang(exchange, sequence.request)
            case Ended(request):
                self._end(request, self._exchanges.pop(request))

    def _end(self, request: Request, exchange: SglangExchange | NativeExchange) -> None:
        self._subscriptions.end(request)
        pixels = [self._executor.take_pixels(sequence) for sequence in request.sequences]
        if request.state is not State.DONE:
            level = logging.INFO if request.state is State.CANCELLED else logging.WARNING
            reason = engine_error(request).message
            logger.log(level, "krea2-srt: request %s: %s", exchange.request_id, reason)
            if isinstance(exchange, SglangExchange):
                self._reply(exchange, failed(exchange, request))
            else:
                self._send(exchange.identity, pickle.dumps(exchange.failed(request)))
            return
        logger.info("krea2-srt: request %s %s", exchange.request_id, summary(request))
        if isinstance(exchange, SglangExchange):
            self._submit_reply(exchange, finished(exchange, request, pixels))
        else:
            reply = partial(self._reply_generated, exchange, request, pixels)
            self._inflight_finalizes.append(self._replies.submit(reply))

    def _reply_generated(
        self, exchange: NativeExchange, request: Request, pixels: list[np.ndarray | None]
    ) -> None:
        """Runs in a thread; raises nothing."""
        try:
            text_encoder = self.worker.pipeline.runner.text_encoder
            reply = exchange.finished(request, pixels, text_encoder)
        except Exception as error:
            logger.exception("krea2-srt: request %s: not encoded", exchange.request_id)
            reply = exchange.failed(ModelError(f"the picture could not be encoded: {error}"))
        self._send(exchange.identity, pickle.dumps(reply))

    def _submit_reply(self, exchange: SglangExchange, output: OutputBatch) -> None:
        """Encode and save the pictures in a thread, and reply from there."""
        self._inflight_finalizes.append(self._replies.start(exchange, output))

    def _reply(self, exchange: SglangExchange, output: OutputBatch) -> None:
        try:
            self._return_item_result((exchange.identity, exchange.payload), output)
        except Exception:
            logger.exception("krea2-srt: request %s: its reply failed", exchange.request_id)
            reply = OutputBatch(error=output.error or "the reply could not be sent")
            self._send(exchange.identity, pickle.dumps(reply))

    def _send(self, identity: bytes, payload: bytes) -> None:
        with self._socket_lock:
            self.receiver.send_multipart([identity, b"", payload])

    # Control.

    def _reply_control(self, identity: bytes, request: ControlRequest) -> None:
        error = _wrong_version(request)
        if error is not None:
            reply = ControlReply(request.control_id, error=error)
        else:
            output = self._dispatch_single_request(request.command)
            reply = ControlReply(request.control_id, output.output, output.error)
        self._send(identity, pickle.dumps(reply))

    def _model(self, _reqs: list[Any]) -> OutputBatch:
        return OutputBatch(output=self._model_info)

    def _drain(self, _reqs: list[Any]) -> OutputBatch:
        self._engine.drain()
        return OutputBatch()

    def _cancel(self, reqs: list[Any]) -> OutputBatch:
        requests = self._requests_of(reqs[0].request_id)
        for request in requests:
            self._handle(self._engine.cancel(request.id))
        return OutputBatch(output={"cancelled": len(requests)})

    def _statistics(self, _reqs: list[Any]) -> OutputBatch:
        where = {"replica": self.dp_replica, "pid": os.getpid()}
        engine, runner = self._engine.statistics(), self._executor.statistics()
        return OutputBatch(output=where | engine | runner)

    def _cancel_lost(self) -> None:
        lost = self.receiver.pop_disconnected()
        if not lost:
            return
        self._subscriptions.drop(lost)
        for request in [r for r, exchange in self._exchanges.items() if exchange.identity in lost]:
            self._handle(self._engine.cancel(request.id))

    # Waiting and ending.

    def _rest(self) -> None:
        overlapped = self._engine.has_overlapped_decodes or self._subscriptions.rendering
        if overlapped and not self.worker.is_sleeping():
            self._wait_idle(_DECODE_POLL_S)
            return
        due_s = None if self._inflight_finalizes else self.worker.release_cache_if_idle()
        self._wait_idle(_IDLE_WAIT_S if due_s is None else min(due_s, _IDLE_WAIT_S))

    def _reap_finalizes(self) -> None:
        self._inflight_finalizes = deque(f for f in self._inflight_finalizes if not f.done())

    def _stop(self) -> None:
        for request in list(self._exchanges):
            # Only if the loop was broken off: a drained engine is empty.
            self._handle(self._engine.cancel(request.id))
        self._replies.finish()
        self._executor.close()
        if self._turn_log is not None:
            self._turn_log.close()
        logger.info("krea2-srt: the engine has stopped: %s", self._engine.statistics())
        # A client that does not read must not keep us.
        self.receiver.close(_LINGER_MS)
        self.context.destroy(_LINGER_MS)


def _wrong_version(message: Any) -> str | None:
    """What to say to a message of another version than ours; SGLang's have none."""
    version = getattr(message, "version", VERSION)
    if version == VERSION:
        return None
    return f"{type(message).__name__}: version {version}, this is {VERSION}"
