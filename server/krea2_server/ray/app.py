"""``serve run krea2_server.ray.app:build``: an HTTP deployment in front of one of engines."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.request_router import RequestRouter

from krea2_server.ray.arguments import Arguments
from krea2_server.ray.autoscaling import QueueSeconds
from krea2_server.ray.engine_replica import EngineReplica
from krea2_server.ray.images_ingress import ImagesIngress
from krea2_server.ray.router import WorkRouter
from krea2_server.settings import Settings

_REPORT_S = 1.0
"""Between two reports of a replica, of which routers and the autoscaler know it."""

_LOOK_BACK_S = 5.0
_HEALTH_S = 5.0
_HEALTH_TIMEOUT_S = 30.0
_LAST_ANSWERS_S = 5.0


def build(args: Arguments) -> Application:
    """The application.

    Args:
        args: checked here, on the cluster's head; what depends on a machine is checked there.
    """
    return build_with(args, WorkRouter)


def build_with(
    args: Arguments,
    router: type[RequestRouter],
    replica: type[EngineReplica] = EngineReplica,
) -> Application:
    """The application with another router before the engines, or other engines."""
    settings, values = args.server_settings(), args.values()
    http = serve.deployment(ImagesIngress).options(
        name="images",
        num_replicas=args.http_replicas,
        max_ongoing_requests=settings.max_requests,
        **_ending(settings),
    )
    return http.bind(values, _engines(args, settings, router, replica).bind(values))


def _engines(
    args: Arguments,
    settings: Settings,
    router: type[RequestRouter],
    replica: type[EngineReplica],
) -> Any:
    policy = AutoscalingPolicy(
        policy_function=QueueSeconds, policy_kwargs={"target_s": args.target_queue_s}
    )
    return serve.deployment(replica).options(
        name="engine",
        # The engine itself refuses what it cannot do in time.
        max_ongoing_requests=settings.max_requests,
        ray_actor_options={"num_gpus": args.gpus, "num_cpus": args.cpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=args.min_replicas,
            initial_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
            metrics_interval_s=_REPORT_S,
            look_back_period_s=_LOOK_BACK_S,
            policy=policy,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=router,
            request_routing_stats_period_s=_REPORT_S,
        ),
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        **_ending(settings),
    )


def _ending(settings: Settings) -> dict[str, Any]:
    """How long a replica that has to go may finish what it has accepted."""
    return {
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": settings.drain_timeout_s + _LAST_ANSWERS_S,
    }
