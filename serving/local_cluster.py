"""A Ray cluster on this machine with nodes that claim simulated TEEs, for `bulkhead serve`.

The nodes have loopback addresses of their own (127.0.0.0/8 is all loopback on Linux), a directory
of their own for sockets and logs, and token authentication; no other Ray cluster on this machine is
seen or touched.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import ray

from placement.inventory import NAME_LABEL, REGION_LABEL, TEE_LABEL
from runtime.cluster.deploy import NAMESPACE
from serving.errors import CommandError
from serving.planning import available_memory
from serving.progress import Step

NODE_TIMEOUT_S = 90.0
OBJECT_STORE_BYTES = 80 << 20  # Ray's least; no tensor ever goes there
MEMORY_SHARE = 0.9
LOCAL_REGION = "local"


class LocalCluster:
    """A head node for the relay and `nodes` worker nodes for shards.

    Args:
        scratch: directory for Ray's sockets and logs, which only we can enter; its path must be
            short.
        nodes: how many worker nodes.
    """

    def __init__(self, scratch: Path, nodes: int) -> None:
        self._scratch = scratch
        # Ray opens its directory to everybody; below one that is ours alone, that opens nothing.
        self._ray_directory = scratch / "ray"
        self._nodes = nodes
        self._workers: list[subprocess.Popen[bytes]] = []
        # Another cluster on this machine may have taken the low addresses.
        self._network = f"127.{secrets.randbelow(254) + 1}.{secrets.randbelow(254) + 1}"

    def start(self, step: Step) -> str:
        """Starts all nodes and connects to them; returns the cluster's address.

        Raises:
            CommandError: a node did not start in time; says where its log is.
        """
        total = self._nodes + 1
        step.update(0, total, "head node")
        ray.init(
            _node_ip_address=f"{self._network}.1",
            _temp_dir=str(self._ray_directory),
            # No processors: the head takes no shards.
            num_cpus=0,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            labels={NAME_LABEL: "head"},
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
        )
        address: str = ray.get_runtime_context().gcs_address
        for number in range(1, self._nodes + 1):
            step.update(number, total, f"node local-{number}")
            self._start_worker(number, address)
        deadline = time.monotonic() + NODE_TIMEOUT_S
        while (alive := sum(1 for node in ray.nodes() if node["Alive"])) < total:
            step.update(alive, total, "waiting for nodes")
            self._check(deadline)
            time.sleep(0.1)
        return address

    def _start_worker(self, number: int, address: str) -> None:
        cores = max(1, (os.cpu_count() or 1) // self._nodes)
        memory = int(available_memory() * MEMORY_SHARE / self._nodes)
        labels = {
            NAME_LABEL: f"local-{number}",
            TEE_LABEL: "simulated",
            REGION_LABEL: LOCAL_REGION,
        }
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            f"--address={address}",
            f"--node-ip-address={self._network}.{number + 1}",
            f"--num-cpus={cores}",
            "--num-gpus=0",
            f"--memory={memory}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--dashboard-agent-listen-port=0",
            "--labels=" + ",".join(f"{name}={value}" for name, value in labels.items()),
            "--disable-usage-stats",
        ]
        with self._log(number).open("wb") as log:
            self._workers.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            )
        # `ray start` takes the first free number for its sockets; two that start at the same moment
        # take the same one, and the second fails.
        socket = self._ray_directory / "session_latest" / "sockets" / f"raylet.{number}"
        deadline = time.monotonic() + NODE_TIMEOUT_S
        while not socket.exists():
            self._check(deadline)
            time.sleep(0.05)

    def _check(self, deadline: float) -> None:
        for number, worker in enumerate(self._workers, 1):
            if worker.poll() is not None:
                raise CommandError(
                    f"Ray node local-{number} ended with code {worker.returncode} while starting; "
                    f"its last line: {_last_line(self._log(number))}"
                )
        if time.monotonic() > deadline:
            raise CommandError(
                f"the local Ray cluster: expected {self._nodes + 1} nodes within "
                f"{NODE_TIMEOUT_S:.0f} s, found fewer; is the machine short of memory or busy?"
            )

    def _log(self, number: int) -> Path:
        return self._scratch / f"node-{number}.log"

    def stop(self) -> None:
        """Ends all nodes at once: there is nothing on them that is worth a slow goodbye."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
        ray.shutdown()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:300] if lines else "(none)"
