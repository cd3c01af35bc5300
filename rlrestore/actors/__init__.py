"""The crew on Ray: thin wrappers without arithmetic around the plain classes. The only place that imports Ray.

Ray reads its security settings when it is imported, so they are set here, before any module of this package imports it:
a local Ray binds to 127.0.0.1 and asks for a token; for a cluster, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH is the user's.
"""

import os

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # the constant that makes Ray listen on loopback only
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
