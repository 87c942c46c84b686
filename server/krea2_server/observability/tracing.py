"""OpenTelemetry traces: a span for each request, and one for each of its stages."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from krea2_server.errors import ApiError
from krea2_srt.errors import ConfigError, how_to_install
from krea2_srt.messages import Generated, GenerateRequest


class RequestSpan:
    """A request's span.

    Args:
        tracer: OpenTelemetry's; None where nothing is traced.
        span: its span of this request.

    Attributes:
        outcome: how it ends: ``done``, ``cancelled`` or an error's code.
    """

    def __init__(self, tracer: Any = None, span: Any = None) -> None:
        self.outcome = "cancelled"
        self._tracer = tracer
        self._span = span

    def add_stages(self, generated: Generated) -> None:
        """The engine has just answered: its stages become spans, one behind the other."""
        if self._span is None:
            return
        from opentelemetry import trace

        # The engine's clock is another: its stages end now, but for the answer's way here.
        at = time.time_ns() - int(sum(generated.stage_ms.values()) * 1e6)
        context = trace.set_span_in_context(self._span)
        for stage, ms in generated.stage_ms.items():
            child = self._tracer.start_span(f"krea2.{stage}", context, start_time=at)
            at += int(ms * 1e6)
            child.end(at)

    def end(self) -> None:
        if self._span is None:
            return
        from opentelemetry import trace

        self._span.set_attribute("krea2.outcome", self.outcome)
        if self.outcome not in ("done", "cancelled"):
            self._span.set_status(trace.StatusCode.ERROR, self.outcome)
        self._span.end()


@contextmanager
def outcome_of(span: RequestSpan) -> Iterator[None]:
    """Tell a span of the error that a part of its request ends in."""
    try:
        yield
    except ApiError as error:
        span.outcome = error.code or str(error.status)
        raise
    except Exception:
        span.outcome = "internal_error"
        raise


class Tracing:
    """Where traces go.

    Args:
        endpoint: of an OTLP collector's HTTP address; empty traces nothing.
        service: this server's name in the traces.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str, service: str = "krea2-srt") -> None:
        self._provider: Any = None
        if not endpoint:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            text = f"otlp_endpoint: OpenTelemetry is not installed; {how_to_install('otel')}"
            raise ConfigError(text) from None

        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    @contextmanager
    def request(
        self, message: GenerateRequest, headers: Mapping[str, str]
    ) -> Iterator[RequestSpan]:
        """The span of a request, a child of its client's if it names one; never the prompt's text.

        Args:
            headers: of the request: ``traceparent`` and ``tracestate``.
        """
        if self._provider is None:
            yield RequestSpan()
            return
        tracer = self._provider.get_tracer("krea2_srt.server")
        image = message.image
        attributes = {
            "krea2.request_id": message.request_id,
            "krea2.size": image.size,
            "krea2.steps": image.steps,
            "krea2.images": image.num_images,
            "krea2.stream": message.progress,
        }
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers)
        started = tracer.start_span("images.generations", parent, attributes=attributes)
        span = RequestSpan(tracer, started)
        try:
            yield span
        finally:
            span.end()

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
