"""OpenTelemetry traces: a span for each request, and one for each of its stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from krea2_srt.sglang.messages import Generated
from server.drawing import Drawing


class RequestSpan:
    """A request's span.

    Args:
        tracer: OpenTelemetry's; None where nothing is traced.
        span: its span of this request.
    """

    def __init__(self, tracer: Any = None, span: Any = None) -> None:
        self._tracer = tracer
        self._span = span

    def end(self, outcome: str, generated: Generated | None) -> None:
        """Tell how the request ended.

        Args:
            outcome: ``done``, ``cancelled`` or an error's code.
            generated: of one that is done; its stages become spans, one behind the other.
        """
        if self._span is None:
            return
        from opentelemetry import trace

        self._span.set_attribute("krea2.outcome", outcome)
        if outcome not in ("done", "cancelled"):
            self._span.set_status(trace.StatusCode.ERROR, outcome)
        stages = generated.stage_ms if generated is not None else {}
        # The engine's clock is another: its stages end now, but for the reply's way here.
        at = time.time_ns() - int(sum(stages.values()) * 1e6)
        context = trace.set_span_in_context(self._span)
        for stage, ms in stages.items():
            child = self._tracer.start_span(f"krea2.{stage}", context, start_time=at)
            at += int(ms * 1e6)
            child.end(at)


class Tracing:
    """Where traces go.

    Args:
        endpoint: of an OTLP collector's HTTP address; empty traces nothing.
        service: this server's name in the traces.
    """

    def __init__(self, endpoint: str, service: str = "krea2-srt") -> None:
        self._provider: Any = None
        if not endpoint:
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    @contextmanager
    def request(self, request_id: str, drawing: Drawing) -> Iterator[RequestSpan]:
        """The span of a request; never the prompt's text."""
        if self._provider is None:
            yield RequestSpan()
            return
        tracer = self._provider.get_tracer("krea2_srt.server")
        image = drawing.image
        attributes = {
            "krea2.request_id": request_id,
            "krea2.size": drawing.size,
            "krea2.steps": image.steps,
            "krea2.images": image.num_images,
            "krea2.stream": drawing.stream,
        }
        span = tracer.start_span("images.generations", attributes=attributes)
        try:
            yield RequestSpan(tracer, span)
        finally:
            span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
