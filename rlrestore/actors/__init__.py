"""The crew on Ray: thin wrappers without arithmetic around the plain classes. The only place that imports Ray.

Ray reads its security settings when it is imported, so they are set here, before any module of this package imports it:
a local Ray binds to 127.0.0.1 and asks for a token; for a cluster, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH is the user's.

Ray's own metrics are off, which nobody reads here: its OpenTelemetry exporter outlives ray.shutdown(), fails for want of an
agent and logs that with a logger that the exit of the process has already destroyed. Up to half of all runs ended in a
segmentation fault after their work was done (Ray 2.60, `OpenTelemetryMetricExporter::Export` under `__run_exit_handlers`).
"""

import os

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # the constant that makes Ray listen on loopback only
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_enable_open_telemetry", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "0")


def before_ray(address: str | None) -> None:
    """To be called before Ray is imported: a driver that joins a cluster must be reachable by its other nodes."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0" if address is None else "1"
