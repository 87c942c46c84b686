"""An orderly end is a success: `sglang serve` stopped by SIGTERM ends with exit code 0."""

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any


def exit_on_sigterm(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND hook of what runs before uvicorn.

    On SIGTERM uvicorn finishes what is in flight, and then raises the signal again for whoever
    handled it before: by default that kills the process, before SGLang has ended its workers.
    """
    by_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if by_default and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return original(*args, **kwargs)
