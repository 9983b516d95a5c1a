"""`ray up` and `ray down` on hosts of ours, with `clusters/local.yaml` as users have it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import yaml

from .hosts import Hosts

_TEMPLATE = Path(__file__).resolve().parents[2] / "clusters" / "local.yaml"
_NODES = (
    "import json, ray; ray.init(address='auto', logging_level='error', log_to_driver=False); "
    "print('NODES', json.dumps(ray.nodes()))"
)


class RayCluster:
    """A Ray cluster on `hosts`: the first is its head.

    `labels` are what each host says of itself beside its name, as users put it into
    ~/.bulkhead-labels. `token` is the file with the cluster's token; `environment` is what a
    program outside the hosts needs to take part.
    """

    def __init__(self, hosts: Hosts, labels: list[str]) -> None:
        self.hosts = hosts
        self.token = hosts.folder / "auth_token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            # What `ray up` remembers of a cluster goes away with the hosts.
            "RAY_TMPDIR": str(hosts.folder),
            "TMPDIR": str(hosts.folder),
        }
        for host, own in zip(hosts.hosts, labels, strict=True):
            hosts.run(host, f"echo {own} > ~/.bulkhead-labels")
        self.file = hosts.folder / "cluster.yaml"
        self.file.write_text(yaml.safe_dump(self._filled_in()))

    def _filled_in(self) -> dict[str, object]:
        cluster = yaml.safe_load(_TEMPLATE.read_text())
        head, *workers = self.hosts.addresses
        cluster["provider"].update(head_ip=head, worker_ips=workers)
        cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.hosts.ssh_key)}
        cluster["min_workers"] = cluster["max_workers"] = len(workers)
        models = _TEMPLATE.parents[1] / "models" / "demo"
        cluster["file_mounts"] = {
            "~/.ray/auth_token": str(self.token),
            "~/models/demo": str(models),
        }
        # The hosts see this machine's packages.
        cluster["setup_commands"] = []
        # Three hosts share one machine's memory.
        text = json.dumps(cluster)
        return dict(json.loads(re.sub(r"--memory=\d+", "--memory=2000000000", text)))

    def up(self) -> None:
        """`ray up`, and waits until every host is a living node."""
        self._ray("up", "-y", "--no-config-cache", str(self.file))
        deadline = time.monotonic() + 120
        while len(alive := [node for node in self.nodes() if node["Alive"]]) < len(
            self.hosts.hosts
        ):
            assert time.monotonic() < deadline, f"only these nodes came up: {alive}"
            time.sleep(1)

    def down(self) -> None:
        """`ray down`."""
        self._ray("down", "-y", str(self.file))

    def nodes(self) -> list[dict[str, object]]:
        """What `ray.nodes()` says to a driver on the head."""
        said = self.hosts.run(0, f'RAY_AUTH_MODE=token python -c "{_NODES}"').stdout
        line = next(line for line in said.splitlines() if line.startswith("NODES "))
        return list(json.loads(line.removeprefix("NODES ")))

    def _ray(self, *arguments: str) -> None:
        done = subprocess.run(
            [str(Path(sys.prefix) / "bin" / "ray"), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"ray {arguments[0]}: {done.stdout[-8000:]}\n{self.logs()}"

    def logs(self, lines: int = 40) -> str:
        """Ends of the logs that say why a cluster did not come up."""
        found = []
        for host in self.hosts.hosts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = self.hosts.run(
                    host,
                    f"cd /tmp/ray/session_latest/logs && tail -n {lines} raylet.out monitor.* "
                    "gcs_server.out 2>/dev/null",
                    check=False,
                )
                found.append(f"== {host.name}\n{done.stdout}")
        return "\n".join(found)
