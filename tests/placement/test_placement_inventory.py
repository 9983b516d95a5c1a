from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from placement.inventory import InventoryError, from_ray_nodes

RAY_NODE: dict[str, object] = {
    "NodeID": "4f" * 28,
    "Alive": True,
    "NodeManagerAddress": "10.0.0.1",
    "NodeManagerHostname": "host",
    "NodeManagerPort": 40001,
    "NodeName": "10.0.0.1",
    "alive": True,
    "Resources": {
        "CPU": 2.0,
        "memory": 9_000_000_000.0,
        "object_store_memory": 4e9,
        "node:10.0.0.1": 1.0,
    },
    "Labels": {
        "ray.io/node-id": "4f" * 28,
        "bulkhead.tee": "simulated",
        "bulkhead.region": "eu-west-1",
        "bulkhead.hardened": "true",
        "bulkhead.name": "alpha",
    },
}


def changed(**changes: object) -> dict[str, object]:
    return {**RAY_NODE, **changes}


def labelled(**labels: str) -> dict[str, object]:
    return changed(Labels={f"bulkhead.{k.replace('_', '-')}": v for k, v in labels.items()})


def test_a_node_is_read() -> None:
    (node,) = from_ray_nodes([RAY_NODE]).nodes
    assert (node.id, node.name, node.address) == ("4f" * 28, "alpha", "10.0.0.1")
    assert (node.tee, node.region, node.hardened) == ("simulated", "eu-west-1", True)
    assert (node.memory_bytes, node.cpus, node.gpus) == (9_000_000_000, 2.0, 0.0)


def test_a_node_survives_a_process_border() -> None:
    (node,) = from_ray_nodes([RAY_NODE]).nodes
    assert copy.copy(node) == node
    with pytest.raises(TypeError):
        node.labels["bulkhead.tee"] = "tdx"  # type: ignore[index]


def test_a_bare_node_is_read() -> None:
    (node,) = from_ray_nodes([changed(Labels={}, Resources={})]).nodes
    assert (node.tee, node.region, node.hardened) == (None, None, False)
    assert node.name == "10.0.0.1-4f4f4f4f"
    assert (node.memory_bytes, node.cpus) == (0, 0.0)


def test_dead_nodes_are_left_out() -> None:
    assert from_ray_nodes([changed(Alive=False), changed(Alive="yes")]).nodes == ()


def test_nodes_are_ordered_by_name() -> None:
    listed = [
        changed(NodeID="b" * 56, Labels={"bulkhead.name": "beta"}),
        changed(NodeID="a" * 56, Labels={"bulkhead.name": "alpha"}),
    ]
    assert [node.name for node in from_ray_nodes(listed).nodes] == ["alpha", "beta"]


def test_memory_can_be_set_by_label() -> None:
    (node,) = from_ray_nodes([labelled(memory_bytes="1024")]).nodes
    assert node.memory_bytes == 1024


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ([RAY_NODE, RAY_NODE], "each id once"),
        ([RAY_NODE, changed(NodeID="aa")], "each name once, found 'alpha' 2 times"),
        ([changed(NodeID=None)], "NodeID"),
        ([changed(NodeManagerAddress=7)], "NodeManagerAddress"),
        ([changed(Labels={"a": 1})], "Labels"),
        ([changed(Labels=["a"])], "Labels"),
        ([changed(Resources=[])], "Resources"),
        ([changed(Resources={"memory": "much"})], "Resources.memory"),
        ([changed(Resources={"CPU": float("nan")})], "Resources.CPU"),
        ([changed(Resources={"CPU": -1})], "Resources.CPU"),
        ([labelled(hardened="yes")], "true or false, found 'yes'"),
        ([labelled(memory_bytes="-5")], "expected bytes"),
        ([labelled(region="a b")], "bulkhead.region"),
        ([labelled(name="a\nb")], "bulkhead.name"),
        ([labelled(tee="")], "bulkhead.tee"),
    ],
)
def test_malformed_nodes_are_refused(listed: list[dict[str, object]], reason: str) -> None:
    with pytest.raises(InventoryError, match=reason):
        from_ray_nodes(listed)


def test_placement_imports_nothing_heavy() -> None:
    program = (
        "import sys, placement.inventory, placement.model_profile, placement.explain\n"
        "print(sorted({'torch', 'ray', 'transformers', 'grpc', 'cryptography'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
