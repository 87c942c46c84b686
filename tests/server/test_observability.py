"""What operators see: JSON logs, traces, metrics, the queue; and that no prompt is in any of it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from krea2_srt.messages import EngineError
from tests.channel import wait_until
from tests.server.serving import serve

SECRET = "a prompt that is nobody's business"


class Collector:
    """An OTLP collector over a real socket."""

    def __init__(self) -> None:
        self.spans: list = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                message = ExportTraceServiceRequest.FromString(body)
                for resource in message.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(span) -> dict:
    values = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        values[each.key] = getattr(each.value, kind)
    return values


@pytest.fixture(scope="module")
def fake_server(shared_engine, tmp_path_factory):
    """One with all that operators may see, whose collector of traces is away."""
    flags = ["--engine-endpoints", shared_engine.endpoint, "--max-requests", "20"]
    flags += ["--log-format", "json", "--log-level", "debug"]
    flags += ["--otlp-endpoint", "http://127.0.0.1:9/v1/traces"]
    with serve(tmp_path_factory.mktemp("watched"), *flags) as server:
        yield server


def test_a_trace_has_the_request_and_its_stages(shared_engine, engine, tmp_path):
    collector = Collector()
    flags = ["--engine-endpoints", engine.endpoint, "--otlp-endpoint", collector.url]
    with serve(tmp_path, *flags) as server:
        trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        headers = {"traceparent": f"00-{trace}-{parent}-01"}
        done = server.post(headers, prompt=SECRET, size="64x96", n=2, user="u-secret")
        engine.error = EngineError("out_of_memory", "no")
        server.post(prompt=SECRET, size="64x64")
        engine.error = None
    # The server has ended, and has sent all that it had.
    collector.close()
    requests = [span for span in collector.spans if span.name == "images.generations"]
    by_outcome = {attributes(span)["krea2.outcome"]: span for span in requests}
    assert by_outcome.keys() == {"done", "out_of_memory"}
    good = by_outcome["done"]
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == (trace, parent)
    assert not by_outcome["out_of_memory"].parent_span_id
    values = attributes(good)
    assert values["krea2.request_id"] == done.headers["x-request-id"]
    assert (values["krea2.size"], values["krea2.images"], values["krea2.steps"]) == ("64x96", 2, 8)
    stages = [span for span in collector.spans if span.parent_span_id == good.span_id]
    assert [span.name for span in sorted(stages, key=lambda span: span.start_time_unix_nano)] == [
        "krea2.queue",
        "krea2.encode",
        "krea2.denoise",
        "krea2.decode",
    ]
    milliseconds = {
        span.name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6 for span in stages
    }
    assert milliseconds["krea2.denoise"] == pytest.approx(30.0, abs=0.01)
    assert by_outcome["out_of_memory"].status.code == 2
    text = str(collector.spans)
    assert SECRET not in text
    assert "u-secret" not in text


def test_a_collector_that_is_away_costs_no_request(fake_server, engine):
    assert fake_server.post(prompt="x", size="64x64").status_code == 200


def test_a_json_log_has_one_object_a_line_and_the_requests_id(fake_server, engine):
    answer = fake_server.post(prompt=SECRET, size="64x64", user="u-secret")
    refused = fake_server.post(prompt=SECRET, size="63")
    streamed = fake_server.post(prompt=SECRET, size="64x64", stream=True)
    fake_server.get("/nowhere%0a?token=abc")
    log = fake_server.log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    by_id = {line["request_id"]: line for line in lines if line.get("status")}
    for response, status in ((answer, 200), (refused, 400), (streamed, 200)):
        line = by_id[response.headers["x-request-id"]]
        assert (line["message"], line["status"]) == ("POST /v1/images/generations", status)
        assert line["ms"] > 0
        assert line["level"] == "INFO"
        assert line["time"]
    assert "token" not in log
    assert SECRET not in log
    assert "u-secret" not in log


def test_metrics_are_prometheus_and_add_up(fake_server, engine):
    before = outcomes(fake_server)
    fake_server.post(prompt="x", size="64x64")
    fake_server.post(prompt="x", size="63")
    fake_server.post(prompt="x", nonsense=1)
    fake_server.post(prompt="x", model="gpt-image-2")
    engine.refuse = EngineError("queue_full", "full", retry_after_s=1.0)
    fake_server.post(prompt="x", size="64x64")
    engine.refuse = None
    assert new_outcomes(fake_server, before) == {
        "done": 1,
        "invalid_value": 1,
        "unknown_parameter": 1,
        "model_not_found": 1,
        "queue_full": 1,
    }
    response = fake_server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert fake_server.metric("krea2_replicas_ready") == 1


def test_the_queue_tells_what_the_engine_says(fake_server, engine):
    engine.hold.set()
    threads = [
        threading.Thread(target=fake_server.post, kwargs={"prompt": "x", "size": "64x64"})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: engine.waiting == 3)
    # At once, not when the server happens to look.
    assert fake_server.get("/v1/queue").json() == {
        "waiting": 3,
        "running": 0,
        "estimated_wait_s": 7.5,
        "replicas_ready": 1,
        "replicas": 1,
    }
    engine.hold.clear()
    for thread in threads:
        thread.join()


@pytest.mark.slow
def test_the_queue_tells_what_runs_from_its_first_step_to_its_end(fake_server, engine):
    engine.on_preview = lambda _: engine.hold.set()
    fields = {"prompt": "x", "size": "64x64", "stream": True, "partial_images": 1}
    thread = threading.Thread(target=fake_server.post, kwargs=fields)
    thread.start()
    wait_until(engine.hold.is_set)
    engine.on_preview = lambda _: None
    behind = threading.Thread(target=fake_server.post, kwargs={"prompt": "x", "size": "64x64"})
    behind.start()
    wait_until(lambda: engine.waiting == 2)
    queue = fake_server.get("/v1/queue").json()
    assert (queue["waiting"], queue["running"]) == (1, 1)
    wait_until(lambda: fake_server.metric("krea2_engine_running_requests", replica="0") == 1)
    engine.hold.clear()
    for each in (thread, behind):
        each.join()
    queue = fake_server.get("/v1/queue").json()
    assert (queue["waiting"], queue["running"], queue["estimated_wait_s"]) == (0, 0, 0.0)


def outcomes(server) -> dict[str, float]:
    """How many requests have ended in which way."""
    families = {f.name: f for f in text_string_to_metric_families(server.get("/metrics").text)}
    return {
        sample.labels["outcome"]: sample.value
        for sample in families["krea2_requests"].samples
        if sample.name == "krea2_requests_total"
    }


def new_outcomes(server, before: dict[str, float]) -> dict[str, float]:
    """The same of those since then."""
    after = outcomes(server)
    new = {name: after[name] - before.get(name, 0) for name in after}
    return {name: count for name, count in new.items() if count}


@pytest.mark.slow
def test_every_request_of_a_storm_is_counted_once(fake_server, engine):
    engine.step_s = 0.01
    kinds = [
        {"size": "64x64"},
        {"size": "64x64", "stream": True, "partial_images": 2},
        {"size": "63"},
        {"nonsense": 1},
        {"size": "64x64", "response_format": "url", "n": 2},
        {"prompt": "x" * 40_000},
    ]
    before = outcomes(fake_server)
    statuses: list[int] = []
    url = f"{fake_server.url}/v1/images/generations"

    def send(number: int) -> None:
        body = {"prompt": "x", **kinds[number % len(kinds)]}
        try:
            # Every third hangs up, some before and some after the answer has begun.
            timeout = 0.05 if number % 3 == 0 else 300
            statuses.append(httpx.post(url, json=body, timeout=timeout).status_code)
        except httpx.TimeoutException:
            statuses.append(0)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(120)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert httpx.post(url, content=b"x" * 2_000_000).status_code == 413
    json_type = {"content-type": "application/json"}
    assert httpx.post(url, content=b"{", headers=json_type).status_code == 400
    wait_until(lambda: sum(new_outcomes(fake_server, before).values()) == 122)
    found = new_outcomes(fake_server, before)
    assert found["request_too_large"] == 1
    assert found["invalid_json"] == 1
    assert found["done"] >= sum(status == 200 for status in statuses)
    assert found.get("cancelled", 0) <= statuses.count(0)
    # Who hung up may have been refused in that moment.
    refused = found.get("too_many_requests", 0)
    assert statuses.count(503) <= refused <= statuses.count(503) + statuses.count(0)
    assert fake_server.get("/v1/queue").json()["running"] == 0
