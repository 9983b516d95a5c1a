"""Three hosts, `ray up` with `clusters/local.yaml`, and what Bulkhead does on them.

The tests of this file use one cluster, in the order in which they stand here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from .hosts import Hosts, HostsUnavailable
from .ray_cluster import RayCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

LABELS = [
    "bulkhead.tee=simulated,bulkhead.region=eu-west",
    "bulkhead.tee=simulated,bulkhead.region=eu-west",
    "bulkhead.tee=simulated,bulkhead.region=eu-north",
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    try:
        hosts = Hosts(3)
    except HostsUnavailable as error:
        pytest.skip(str(error))
    with hosts:
        yield RayCluster(hosts, LABELS)
    assert hosts.leftovers() == []


def test_ray_up_starts_a_labelled_node_on_each_host(cluster: RayCluster) -> None:
    cluster.up()

    nodes = {str(node["NodeManagerAddress"]): node for node in cluster.nodes()}
    assert sorted(nodes) == sorted(cluster.hosts.addresses)
    for host, own in zip(cluster.hosts.hosts, LABELS, strict=True):
        labels = nodes[host.address]["Labels"]
        expected = dict(label.split("=") for label in own.split(","))
        assert isinstance(labels, dict)
        assert labels.items() >= {**expected, "bulkhead.name": host.name}.items()


def test_ray_down_leaves_nothing_behind(cluster: RayCluster) -> None:
    assert cluster.hosts.leftovers(), "no Ray to take down"
    began = time.monotonic()

    cluster.down()

    # Workers stop by themselves once they have missed the head for a minute.
    assert cluster.hosts.wait_until_clean(120) == []
    print(f"clean {time.monotonic() - began:.0f} s after `ray down` was called")
