"""Prometheus metrics: of the requests here, and of what the engine counts."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from krea2_server.engine.base import Engine
from krea2_server.moderation.moderator import Moderator
from krea2_srt.messages import Generated, GenerateRequest
from krea2_srt.request import ImageRequest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 2, 4, 8, 15, 30, 60, 120, 300)
_SIDES = (256, 512, 768, 1024, 1536, 2048)
_STEP_SECONDS = (0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

_FROM_THE_START = (
    "done",
    "cancelled",
    "queue_full",
    "rate_limit_exceeded",
    "concurrency_limit",
    "engine_unavailable",
    "generation_failed",
    "internal_error",
    "out_of_memory",
    "deadline_exceeded",
    "storage_full",
    "storage_failed",
    "moderation_unavailable",
)
"""Outcomes that are there from the start, as 0, as sizes are: else the first would be no change."""

# Of each replica, by the name in its statistics.
_ENGINE_COUNTERS = {
    "steps": ("krea2_engine_steps", "Steps of sequences."),
    "packs": ("krea2_engine_packs", "Forwards; steps per pack is the batch size."),
    "tokens": ("krea2_engine_pack_tokens", "Tokens of all forwards."),
    "encode_s": ("krea2_engine_encode_seconds", "Time in the text encoder."),
    "step_s": ("krea2_engine_step_seconds", "Time in denoising steps."),
    "step_flops": (
        "krea2_engine_step_flops",
        "Floating-point operations of the steps; over the hardware's rate, the least they take.",
    ),
    "step_weight_bytes": (
        "krea2_engine_step_weight_bytes",
        "Bytes of weights that the steps read; over the memory's rate, the least they take.",
    ),
    "decode_s": (
        "krea2_engine_decode_seconds",
        "Time in VAE decodes, but for those that run beside the steps.",
    ),
    "busy_s": ("krea2_engine_busy_seconds", "Time in units of work."),
    "out_of_memory": ("krea2_engine_out_of_memory", "Times that memory ran out."),
    "retried": ("krea2_engine_retried_sequences", "Sequences run again after a failed pack."),
    "context_cache_hits": ("krea2_engine_prompt_cache_hits", "Prompts found encoded."),
    "context_cache_misses": ("krea2_engine_prompt_cache_misses", "Prompts that were encoded."),
    "adapter_hits": ("krea2_engine_adapter_hits", "Adapters found on the device."),
    "adapter_uploads": ("krea2_engine_adapter_uploads", "Adapters copied to the device."),
    "adapter_reads": ("krea2_engine_adapter_reads", "Adapters read from their files."),
    "adapter_evictions": (
        "krea2_engine_adapter_evictions",
        "Adapters that made room for others on the device.",
    ),
    "graph_replays": ("krea2_engine_graph_replays", "Forwards that were a CUDA graph."),
    "graph_misses_too_large": (
        "krea2_engine_graph_misses_too_large",
        "Forwards that ran kernel by kernel: too large for a graph.",
    ),
    "graph_misses_first_use": (
        "krea2_engine_graph_misses_first_use",
        "Forwards that ran kernel by kernel: the first of their size.",
    ),
    "graph_misses_failed": (
        "krea2_engine_graph_misses_failed",
        "Forwards that ran kernel by kernel: the capture for their size has failed.",
    ),
    "graph_misses_adapters": (
        "krea2_engine_graph_misses_adapters",
        "Forwards that ran kernel by kernel: of prompts with adapters, or of packs with some that "
        "have no slots.",
    ),
}
_ENGINE_GAUGES = {
    "waiting": ("krea2_engine_waiting_requests", "Requests that have not begun."),
    "running": ("krea2_engine_running_requests", "Requests that have begun."),
    "active_sequences": ("krea2_engine_active_sequences", "Images under way."),
    "outstanding_s": ("krea2_engine_outstanding_seconds", "Estimated work in the engine."),
    "pack_tokens_budget": ("krea2_engine_pack_tokens_budget", "Most tokens in one forward."),
    "longest_turn_ms": ("krea2_engine_longest_turn_milliseconds", "Longest unit of work."),
    "device_memory_bytes": (
        "krea2_engine_device_memory_bytes",
        "Memory that the engine has reserved on the device.",
    ),
    "device_memory_peak_bytes": ("krea2_engine_device_memory_peak_bytes", "The most of it so far."),
    "context_cache_bytes": ("krea2_engine_prompt_cache_bytes", "Memory of encoded prompts."),
    "adapters_on_device": ("krea2_engine_adapters_on_device", "Adapters kept on the device."),
    "adapters_on_host": ("krea2_engine_adapters_on_host", "Adapters kept in host memory."),
    "adapter_device_bytes": (
        "krea2_engine_adapter_device_bytes",
        "Memory of adapters on the device.",
    ),
    "adapter_host_bytes": ("krea2_engine_adapter_host_bytes", "Memory of adapters on the host."),
    "graphs": ("krea2_engine_graphs", "CUDA graphs that are kept."),
    "graphs_failed": (
        "krea2_engine_graphs_failed",
        "Sizes that could not be captured; the engine's log and its statistics say why.",
    ),
}


class Metrics:
    """Everything that ``/metrics`` shows.

    Args:
        engine: whose statistics are shown.
        moderator: whose counts are shown.
    """

    def __init__(self, engine: Engine, moderator: Moderator | None) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "krea2_requests",
            "Requests for images by how they ended: done, cancelled, or the error's code.",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in _FROM_THE_START:
            self._requests.labels(outcome)
        self._images = Counter(
            "krea2_images",
            "Images sent to clients, by the smallest of some squares that has as many pixels.",
            ["up_to"],
            registry=self._registry,
        )
        self._adapter_images = Counter(
            "krea2_adapter_images",
            "Images sent to clients that an adapter was used for, by the name of the key.",
            ["key", "adapter"],
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "krea2_request_seconds",
            "Time of requests that were done, in this process and the engine, until there was "
            "something to send, by the size class of krea2_images_total.",
            ["up_to"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        for side in _SIDES:
            self._images.labels(_class_of(side))
            self._request_seconds.labels(_class_of(side))
        self._stage_seconds = Histogram(
            "krea2_stage_seconds",
            "Time of requests that were done in each stage: queue, encode, denoise, decode.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._step_seconds = Histogram(
            "krea2_step_seconds",
            "Denoising time of requests that were done, divided by their steps: what a step takes "
            "with all that a request shares the engine with.",
            buckets=_STEP_SECONDS,
            registry=self._registry,
        )
        self.previews = Counter(
            "krea2_previews", "Partial images sent to clients.", registry=self._registry
        )
        replicas_ready = Gauge(
            "krea2_replicas_ready", "Replicas that answer.", registry=self._registry
        )
        replicas_ready.set_function(lambda: engine.num_ready)
        self._registry.register(_EngineCollector(engine))
        if moderator is not None:
            self._registry.register(_ModerationCollector(moderator))

    def ended(self, outcome: str) -> None:
        """Count a request for images.

        Args:
            outcome: ``done``, ``cancelled`` or an error's code.
        """
        self._requests.labels(outcome).inc()

    def done(
        self, message: GenerateRequest, generated: Generated, client: str, seconds: float
    ) -> None:
        """Count what one that is done has taken.

        Args:
            client: whose it was.
            seconds: from its validation until its images were there.
        """
        size = _size_class(message.image)
        self._request_seconds.labels(size).observe(seconds)
        self._images.labels(size).inc(len(generated.images))
        for use in generated.adapters:
            self._adapter_images.labels(client, use.name).inc(len(generated.images))
        for stage, ms in generated.stage_ms.items():
            self._stage_seconds.labels(stage).observe(ms / 1e3)
        step_ms = generated.stage_ms.get("denoise", 0.0) / message.image.steps
        self._step_seconds.observe(step_ms / 1e3)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


def _size_class(image: ImageRequest) -> str:
    # Not the size itself: clients could make as many series as there are sizes.
    pixels = image.width * image.height
    side = next((side for side in _SIDES if pixels <= side**2), None)
    return _class_of(side) if side else "more"


def _class_of(side: int) -> str:
    return f"{side}x{side}"


class _EngineCollector:
    """The engine's statistics as of the last look at them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for kind, table in (
            (CounterMetricFamily, _ENGINE_COUNTERS),
            (GaugeMetricFamily, _ENGINE_GAUGES),
        ):
            for key, (name, text) in table.items():
                family = kind(name, text, labels=["replica"])
                for replica, statistics in self._engine.statistics.items():
                    if key in statistics:
                        family.add_metric([replica], statistics[key])
                yield family


class _ModerationCollector:
    def __init__(self, moderator: Moderator) -> None:
        self._moderator = moderator

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "krea2_moderation_checks", "Checks of content.", labels=["stage", "outcome"]
        )
        for (stage, outcome), count in self._moderator.counts.items():
            family.add_metric([stage, outcome], count)
        yield family
