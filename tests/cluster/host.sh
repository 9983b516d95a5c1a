#!/usr/bin/env bash
# First process of a host. It says that its namespaces exist, waits until its cable is plugged in,
# and becomes sshd, which also reaps what daemons leave behind. When the test's end of its standard
# input closes, for whatever reason, sshd is told to end, and with it everything on the host.
set -eu
hostname "$NAME"
mount --make-rprivate /
# What the tests stand on stays visible even where it lies under /tmp.
mapfile -t kept < <(printf '%s' "$KEPT")
for folder in "${kept[@]}"; do exec {opened}<"$folder"; descriptors+=("$opened"); done
for place in /dev/shm /tmp /run; do mount -t tmpfs -o mode=1777,size=4g tmpfs "$place"; done
for index in "${!kept[@]}"; do
    mkdir -p "${kept[index]}"
    mount --no-canonicalize --bind "/proc/self/fd/${descriptors[index]}" "${kept[index]}"
    exec {descriptors[index]}<&-
done
mkdir -p /run/sshd /run/home /run/host
chmod 755 /run/sshd
chmod 700 /run/home
echo ready
read -r _
ip link set lo up
ip address add "$ADDRESS/$PREFIX" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
printf 'root:x:0:0:root:/run/home:/bin/bash\nsshd:x:%s:65534::/run/sshd:/usr/sbin/nologin\n' \
    "$(id -u sshd)" > /run/host/passwd
printf 'root:*:19000:0:99999:7:::\n' > /run/host/shadow
printf 'export PATH=%s PYTHONPATH=%s\n' "$HOST_PATH" "$REPOSITORY" | tee /run/home/.profile > /run/home/.bashrc
ssh-keygen -q -t ed25519 -N '' -f /run/host/key
cat > /run/host/sshd_config <<END
ListenAddress $ADDRESS
HostKey /run/host/key
AuthorizedKeysFile /run/host/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
MaxSessions 100
END
printf '%s\n' "$AUTHORIZED" > /run/host/authorized_keys
mount --bind /run/host/passwd /etc/passwd
mount --bind /run/host/shadow /etc/shadow
# Bash gives a background job no standard input of ours.
exec {lifeline}<&0
(set +e; read -r _ <&"$lifeline"; kill -TERM 1) &
exec /usr/sbin/sshd -D -e -f /run/host/sshd_config < /dev/null
