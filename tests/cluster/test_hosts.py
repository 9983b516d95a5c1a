"""The hosts that the cluster tests stand on are apart, can be cut off, and leave nothing."""

from __future__ import annotations

import pytest

from .hosts import Hosts, HostsUnavailable

pytestmark = pytest.mark.cluster


def test_hosts_are_apart_can_be_cut_and_leave_nothing() -> None:
    try:
        hosts = Hosts(2)
    except HostsUnavailable as error:
        pytest.skip(str(error))
    with hosts:
        first, second = hosts.hosts
        assert hosts.leftovers() == []

        hosts.run(first, "echo secret > /tmp/file; echo x > /dev/shm/segment; echo y > ~/home")
        seen = hosts.run(second, "ls /tmp /dev/shm ~; hostname; ps ax").stdout
        assert "file" not in seen
        assert "segment" not in seen
        assert "home" not in seen.replace("/run/home", "")
        assert second.name in seen

        hosts.run(first, "sleep 1000 > /dev/null 2>&1 &")
        left = hosts.leftovers()
        assert any("sleep 1000" in line for line in left)
        assert any("segment" in line for line in left)

        reach = f"true < /dev/tcp/{second.address}/22"
        assert hosts.run(first, reach, check=False).returncode == 0
        with hosts.is_cut(second):
            assert hosts.run(first, f"timeout 3 bash -c '{reach}'", check=False).returncode != 0
            assert hosts.run(second, "true", check=False).returncode != 0
        assert hosts.run(first, reach, check=False).returncode == 0
    assert hosts.leftovers() == []


def test_hosts_go_away_when_the_test_fails() -> None:
    try:
        hosts = Hosts(1)
    except HostsUnavailable as error:
        pytest.skip(str(error))
    with pytest.raises(KeyboardInterrupt), hosts:
        hosts.run(0, "sleep 1000 > /dev/null 2>&1 &")
        raise KeyboardInterrupt
    assert hosts.leftovers() == []
