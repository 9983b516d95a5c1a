"""What Ray reads from the environment, which it does when it is imported. This module does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def local_cluster_environment(inherited: Mapping[str, str], token: Path) -> dict[str, str]:
    """The environment of a process that starts a Ray cluster of its own.

    Settings of other clusters (RAY_ADDRESS above all) are left out.

    Args:
        inherited: the environment so far.
        token: file with the cluster's token; Ray's processes on this machine read it too.
    """
    environment = {name: value for name, value in inherited.items() if not name.startswith("RAY_")}
    environment.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
    return environment
