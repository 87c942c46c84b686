"""Variables that Kubernetes sets in every container, for each Service of its namespace.

A Service ``krea2-serve`` or ``krea2-srt-metrics`` makes ``KREA2_SERVE_SERVICE_HOST=10.0.0.1`` or
``KREA2_SRT_METRICS_PORT=tcp://10.0.0.1:80``, which look like settings of ours and are none.
"""

import re

_HOST = r"[0-9A-Fa-f.:]+"
_NUMBER = r"[0-9]+"
_URL = r"(tcp|udp|sctp)://\S+:[0-9]+"
_OF_A_PORT = r"PORT_[0-9]+_(TCP|UDP|SCTP)"

_SHAPES = tuple(
    (re.compile(rf"(.*_)?{name}"), re.compile(value))
    for name, value in (
        ("SERVICE_HOST", _HOST),
        (r"SERVICE_PORT(_\w+)?", _NUMBER),
        ("PORT", _URL),
        (_OF_A_PORT, _URL),
        (f"{_OF_A_PORT}_PROTO", "tcp|udp|sctp"),
        (f"{_OF_A_PORT}_PORT", _NUMBER),
        (f"{_OF_A_PORT}_ADDR", _HOST),
    )
)
"""Names and values, as `k8s.io/kubernetes/pkg/kubelet/envvars` writes them."""


def is_service_link(variable: str, value: str) -> bool:
    """Whether a variable is one of those, by its name and its value."""
    return any(name.fullmatch(variable) and form.fullmatch(value) for name, form in _SHAPES)
