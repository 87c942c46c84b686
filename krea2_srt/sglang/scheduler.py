"""SGLang's diffusion scheduler with our engine in its loop.

Everything around the loop is SGLang's: the channel, control requests, how results are saved and
sent, metrics. For a model that our pipeline does not serve, the loop is SGLang's too.
"""

import gc
import logging
import os
import signal
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.runtime.entrypoints.control_requests import (
    ListLorasReq,
    MergeLoraWeightsReq,
    SetLoraReq,
    ShutdownReq,
    UnmergeLoraWeightsReq,
)
from sglang.multimodal_gen.runtime.entrypoints.post_training.io_struct import (
    ReleaseMemoryOccupationReqInput,
)
from sglang.multimodal_gen.runtime.managers.scheduler import Scheduler
from sglang.multimodal_gen.runtime.pipelines_core import Req
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

from krea2_srt.engine.engine import Engine, check_urgency
from krea2_srt.engine.events import Ended, Event, Progress, Started
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.engine.turn_log import TurnLog
from krea2_srt.errors import (
    DrainingError,
    Krea2Error,
    RequestCancelledError,
    RequestError,
    foreign,
)
from krea2_srt.lora.library import AwaitedAdapters
from krea2_srt.messages import (
    VERSION,
    Cancel,
    ControlReply,
    ControlRequest,
    EngineError,
    GenerateRequest,
    GetModel,
    GetStatistics,
    ModelInfo,
)
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.request import AdapterUse, ImageRequest
from krea2_srt.runner.calibration import cached_calibration
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.sglang.client_monitor import WatchedRouter, events_in_order
from krea2_srt.sglang.default_adapters import DefaultAdapters
from krea2_srt.sglang.exchange import Exchange, summary
from krea2_srt.sglang.native_exchange import NativeExchange
from krea2_srt.sglang.pipeline import Krea2RunnerPipeline
from krea2_srt.sglang.previews import Previews
from krea2_srt.sglang.replies import Replies
from krea2_srt.sglang.served import serves_krea2
from krea2_srt.sglang.served_adapters import AdapterCommand, ServedAdapters
from krea2_srt.sglang.sglang_exchange import SglangExchange
from krea2_srt.start_up import process_age_s

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
_POLL_S = 0.001
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
        self._exchanges: dict[Request, Exchange] = {}
        self._previews = Previews(self._executor)
        self._adapters = ServedAdapters(pipeline.adapters)
        self._defaults = DefaultAdapters(
            self._adapters, runner.adapters, runner.dit, pipeline.any_adapter_path
        )
        self._numbers = count()
        self._replies = Replies(self.worker, self._send, self._return_item_result)
        self.request_handlers |= {
            ShutdownReq: self._drain,
            GetStatistics: self._statistics,
            GetModel: self._model,
        }
        quantized = f"+{runner.dit.quantization.format}" if runner.dit.quantization else ""
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
            pipeline.adapters is not None,
        )
        if runner.start_up is not None:
            logger.info("krea2-srt: %s", runner.start_up.text(process_age_s()))

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
                self._adapters.poll()
                self._cancel_lost()
                if (events := self._turn()) is not None:
                    self._handle(events)
                if not self._previews.render(self._max_turn_ms) and events is None:
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
        if not self._engine.draining:
            return False
        self._adapters.refuse()
        return self._engine.idle or self.worker.is_sleeping()

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
                self._native_exchange(identity, payload).failed(error)
            case ControlRequest(control_id):
                self._replies.send(identity, ControlReply(control_id, error=str(error)))
            case Cancel():
                pass  # nobody waits for an answer
            case _:
                self._replies.reply(identity, payload, OutputBatch(error=str(error)))

    def _accept(self, identity: bytes, payload: Any) -> None:
        reqs = payload if isinstance(payload, list) else [payload]
        if reqs and all(isinstance(req, Req) for req in reqs):
            exchange = SglangExchange(
                identity, payload, reqs, self._replies, self.server_args, self.metrics
            )
            if exchange.profiled:
                self._run_profiled(exchange)
            else:
                self._submit(exchange)
            return
        match payload:
            case GenerateRequest():
                self._submit(self._native_exchange(identity, payload))
            case ControlRequest():
                self._reply_control(identity, payload)
            case Cancel():
                self._cancel(identity, payload)
            case SetLoraReq() | MergeLoraWeightsReq() | UnmergeLoraWeightsReq() | ListLorasReq():
                self._defaults.command(
                    payload, lambda output: self._replies.reply(identity, payload, output)
                )
            case _ if (error := _wrong_version(payload)) is not None:
                self._replies.reply(identity, payload, OutputBatch(error=error))
            case _:
                if isinstance(payload, ReleaseMemoryOccupationReqInput):
                    # Before SGLang moves the weights and empties the allocator's cache.
                    self._executor.release_memory()
                self._replies.reply(identity, payload, self._dispatch_single_request(payload))
                if self.worker.is_sleeping():
                    # The weights have moved, and graphs would read where they were.
                    self._executor.release_graphs()

    def _native_exchange(self, identity: bytes, message: GenerateRequest) -> NativeExchange:
        return NativeExchange(identity, message, self._replies, self._previews)

    def _submit(self, exchange: Exchange) -> None:
        try:
            self._refuse_asleep(exchange)
            images = exchange.images(self._limits)
            if not exchange.adapters:
                self._enter(exchange, images, *self._defaults.of(exchange))
                return
            check_urgency(exchange.priority, exchange.deadline_s)
            arrived = time.monotonic()
            self._adapters.ask(
                exchange,
                lambda awaited: self._enter_with_adapters(exchange, images, awaited, arrived),
            )
        except (Krea2Error, ValueError) as error:
            self._refuse(exchange, error)

    def _enter_with_adapters(
        self,
        exchange: Exchange,
        images: list[ImageRequest],
        awaited: AwaitedAdapters,
        arrived: float,
    ) -> None:
        try:
            uses, held = awaited.result()
            self._enter(exchange, images, uses, held, time.monotonic() - arrived)
        except (Krea2Error, ValueError) as error:
            self._refuse(exchange, error)

    def _enter(
        self,
        exchange: Exchange,
        images: list[ImageRequest],
        adapters: frozenset[AdapterUse],
        held: object,
        waited_s: float = 0.0,
    ) -> None:
        """Put a request into the engine.

        Args:
            adapters: of all its images.
            held: what has to live as long as it does.
            waited_s: since it arrived.

        Raises:
            Krea2Error, ValueError: it is refused.
        """
        deadline_s = exchange.deadline_s
        if deadline_s is not None and waited_s:
            deadline_s = max(0.0, deadline_s - waited_s)
        request = self._engine.submit(
            f"{exchange.request_id}#{next(self._numbers)}",
            [replace(image, adapters=adapters) for image in images] if adapters else images,
            exchange.priority,
            deadline_s,
        )
        exchange.held = held
        self._exchanges[request] = exchange
        try:
            exchange.accepted(request)
        except Exception as error:
            # One answer is enough.
            logger.exception("krea2-srt: request %s: not accepted", exchange.request_id)
            self._engine.cancel(request.id)
            del self._exchanges[request]
            exchange.failed(foreign(error))

    def _run_profiled(self, exchange: SglangExchange) -> None:
        """SGLang's profiler covers a request from end to end: it has the engine to itself."""
        try:
            self._refuse_asleep(exchange)
            exchange.images(self._limits)
            if self._defaults.of(exchange)[0]:
                raise RequestError("profile", "is not possible while /v1/set_lora has set adapters")
            if not self._engine.idle or self._engine.draining:
                text = "is only possible while nothing else is in the engine"
                raise RequestError("profile", text)
        except (Krea2Error, ValueError) as error:
            self._refuse(exchange, error)
            return
        with self.worker.pipeline.runner.on_stream():
            exchange.reply(self.worker.execute_forward(exchange.reqs))

    def _refuse(self, exchange: Exchange, error: Exception) -> None:
        logger.warning("krea2-srt: request %s refused: %s", exchange.request_id, error)
        exchange.failed(error)

    def _refuse_asleep(self, exchange: Exchange) -> None:
        if self.worker.is_sleeping():
            raise DrainingError(exchange.ASLEEP)

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
                self._exchanges[request].started()
            case Progress(sequence):
                self._exchanges[sequence.request].progress(event)
            case Ended(request):
                self._end(request, self._exchanges.pop(request))

    def _end(self, request: Request, exchange: Exchange, reply: bool = True) -> None:
        """A request has ended.

        Args:
            reply: whether its client still listens.
        """
        pixels = [self._executor.take_pixels(sequence) for sequence in request.sequences]
        if request.state is State.DONE:
            logger.info("krea2-srt: request %s %s", exchange.request_id, summary(request))
            try:
                self._inflight_finalizes.append(exchange.finished(request, pixels))
            except Exception as error:
                logger.exception("krea2-srt: request %s: not answered", exchange.request_id)
                exchange.failed(foreign(error))
            return
        reason = request.error or RequestCancelledError("the request was cancelled")
        level = logging.INFO if request.state is State.CANCELLED else logging.WARNING
        logger.log(level, "krea2-srt: request %s: %s", exchange.request_id, reason)
        if reply:
            exchange.failed(reason)
        else:
            exchange.abandoned(reason)

    def _send(self, identity: bytes, payload: bytes) -> None:
        with self._socket_lock:
            self.receiver.send_multipart([identity, b"", payload])

    # Control.

    def _reply_control(self, identity: bytes, request: ControlRequest) -> None:
        def reply(output: object, error: Krea2Error | str | None) -> None:
            said = EngineError.of(error) if isinstance(error, Krea2Error) else error
            self._replies.send(identity, ControlReply(request.control_id, output, said))

        error, command = _wrong_version(request), request.command
        if error is not None:
            reply(None, error)
        elif isinstance(command, AdapterCommand):
            self._adapters.command(command, reply)
        else:
            found = self._dispatch_single_request(command)
            reply(found.output, found.error)

    def _model(self, _reqs: list[Any]) -> OutputBatch:
        return OutputBatch(output=self._model_info)

    def _drain(self, _reqs: list[Any]) -> OutputBatch:
        self._engine.drain()
        return OutputBatch()

    def _statistics(self, _reqs: list[Any]) -> OutputBatch:
        where = {"replica": self.dp_replica, "pid": os.getpid()}
        engine, runner = self._engine.statistics(), self._executor.statistics()
        adapters = {"adapters": self._adapters.statistics()}
        return OutputBatch(output=where | engine | runner | adapters)

    # Cancelling.

    def _cancel(self, identity: bytes, message: Cancel) -> None:
        """A client cancels: its own request, for which it no longer listens, or another's."""
        if (error := _wrong_version(message)) is not None:
            logger.warning("krea2-srt: %s", error)
            return
        for request, exchange in list(self._exchanges.items()):
            if exchange.request_id == message.request_id:
                self._end_early(request, reply=exchange.identity != identity)
        for exchange in self._adapters.exchanges:
            if exchange.request_id == message.request_id:
                self._forget(exchange, reply=exchange.identity != identity)

    def _cancel_lost(self) -> None:
        """Cancel what clients have left behind that are gone."""
        lost = self.receiver.pop_disconnected()
        if not lost:
            return
        for request, exchange in list(self._exchanges.items()):
            if exchange.identity in lost:
                self._end_early(request, reply=False)
        for exchange in self._adapters.exchanges:
            if exchange.identity in lost:
                self._forget(exchange, reply=False)

    def _forget(self, exchange: Exchange, reply: bool) -> None:
        """End a request whose adapters are on their way."""
        self._adapters.forget(exchange)
        reason = RequestCancelledError("the request was cancelled")
        if reply:
            exchange.failed(reason)
        else:
            exchange.abandoned(reason)

    def _end_early(self, request: Request, reply: bool) -> None:
        self._engine.cancel(request.id)
        self._end(request, self._exchanges.pop(request), reply)

    # Waiting and ending.

    def _rest(self) -> None:
        overlapped = self._engine.has_overlapped_decodes or self._previews.rendering
        if self._adapters.waiting or (overlapped and not self.worker.is_sleeping()):
            self._wait_idle(_POLL_S)
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
        self._adapters.close()
        self._defaults.close()
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
