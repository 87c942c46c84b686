"""Routing among data-parallel replicas, by outstanding work.

SGLang takes them in turn: small requests queue behind a big one while another replica idles, and
one dead replica ends them all.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from krea2_srt.messages import Cancel, GetStatistics
from krea2_srt.request import ImageRequest
from krea2_srt.routing import NONE_LEFT, ReplicaExited, Replicas, image_ms

logger = logging.getLogger(__name__)


def estimated_ms(batch: Any) -> int:
    """Work of a message to a scheduler: a ``Req``, a list of them, or another, which is quick.

    Impossible fields do no harm here; refusing them is the engine's affair.
    """
    if isinstance(batch, list):
        return sum(estimated_ms(request) for request in batch)
    if not hasattr(batch, "num_inference_steps"):
        return 1
    prompt, scale = getattr(batch, "prompt", None), getattr(batch, "guidance_scale", None)
    request = ImageRequest(
        prompt=prompt[:4096] if isinstance(prompt, str) else "",
        width=_whole(batch, "width", 1024, most=8192),
        height=_whole(batch, "height", 1024, most=8192),
        steps=_whole(batch, "num_inference_steps", 8, most=1000),
        # Switches the second lane on. SGLang's scale is Krea's plus 1.
        guidance=1.0 if isinstance(scale, (int, float)) and scale > 1 else 0.0,
    )
    images = _whole(batch, "num_outputs_per_prompt", 1, most=1000)
    images *= len(prompt) if isinstance(prompt, list) else 1
    return image_ms(request, images)


def _whole(batch: Any, field: str, default: int, *, most: int) -> int:
    value = getattr(batch, field, None)
    return int(max(1, min(value, most))) if isinstance(value, (int, float)) else default


_replicas: WeakKeyDictionary[Any, Replicas] = WeakKeyDictionary()


def replicas_of(client: Any, count: int) -> Replicas:
    """The replicas of one of SGLang's clients."""
    found = _replicas.get(client)
    if found is None or len(found) != count:
        _replicas[client] = found = Replicas(count)
    return found


async def forward(
    original: Callable[..., Awaitable[Any]], client: Any, batch: Any, timeout_ms: int | None = None
) -> Any:
    """AROUND hook of ``AsyncSchedulerClient.forward``."""
    endpoints = [] if client.context is None else client.server_args.scheduler_endpoints
    if len(endpoints) < 2:
        return await original(client, batch, timeout_ms)
    from sglang.multimodal_gen.runtime import scheduler_client as sglang_client

    replicas = replicas_of(client, len(endpoints))

    async def forward_one(work: int, index: int | None = None) -> Any:
        with replicas.forward(work, index) as index:
            return await client._forward_one(endpoints[index], batch, timeout_ms)

    async def forward_to_all(merge: Callable[[list[Any]], Any]) -> Any:
        results = []
        for index in replicas.live:
            with suppress(ReplicaExited):
                results.append(await forward_one(1, index))
        if not results:
            raise ReplicaExited(NONE_LEFT)
        return merge(results)

    client.request_logger.log_received_request(batch)
    if isinstance(batch, sglang_client._CONTROL_REQ_TYPES):
        # To its end, even if the client hangs up: half of the replicas with new weights would draw
        # other pictures than the other half.
        output = await asyncio.shield(forward_to_all(sglang_client._merge_fanout_results))
    elif isinstance(batch, Cancel | GetStatistics):
        output = await forward_to_all(partial(merged_answers, batch))
    elif sglang_client._session_key(batch) is not None:
        index = sglang_client._select_replica(batch, len(endpoints), client._replica_counter)
        output = await forward_one(estimated_ms(batch), index)
    else:
        output = await forward_one(estimated_ms(batch))
    client.request_logger.log_finished_request(batch, output)
    return output


def merged_answers(question: Cancel | GetStatistics, outputs: list[Any]) -> Any:
    """One answer from all replicas: the sum of what was cancelled; a list of statistics."""
    merged = outputs[0]
    answers = [output.output for output in outputs if not output.error]
    if isinstance(question, GetStatistics):
        merged.output = answers
    elif answers:
        merged.output = {"cancelled": sum(answer["cancelled"] for answer in answers)}
    return merged


def backend_failure(original: Callable[[Any], str | None], app: Any) -> str | None:
    """AROUND hook of the HTTP server's ``_backend_failure``: a dead replica is no failure while
    another lives. What counts as dead, and every other failure, is SGLang's to say.
    """
    state, workers = app.state, app.state.worker_processes
    # A replica of several processes (tensor parallel, say) cannot lose one; there SGLang is right.
    if len(workers) < 2 or len(workers) != state.server_args.dp_size:
        return original(app)
    from sglang.multimodal_gen.runtime.scheduler_client import async_scheduler_client

    def failure(workers: list[Any], broker: Any = None, disagg: Any = None) -> str | None:
        parts = {"worker_processes": workers, "broker_task": broker, "disagg_server": disagg}
        return original(SimpleNamespace(state=SimpleNamespace(**parts)))

    replicas = replicas_of(async_scheduler_client, len(workers))
    for index in replicas.live:
        if failure([workers[index]]):
            replicas.mark_dead(index)
            left = len(replicas.live)
            logger.warning("replica %d has exited; %d of %d left", index, left, len(workers))
    return failure([] if replicas.live else workers, state.broker_task, state.disagg_server)
