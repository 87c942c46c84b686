#!/usr/bin/env bash
# Does in a clean Debian root what the Dockerfile does for the CPU image, where no engine is that
# could build it: installs, and runs the entry point on a read-only root until it has generated an
# image: as the image's user, and then on the same cache as another of group 0. As root, with
# debootstrap:
#
#   deploy/docker/prove.sh [ROOT]
set -euo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
root=${1:-$(mktemp -d)}
port=30999

enter=(chroot "$root" env -i PATH=/opt/krea2/bin:/usr/sbin:/usr/bin:/bin HOME=/cache LANG=C.UTF-8
  SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt)

[[ -x $root/usr/bin/python3 ]] || debootstrap --variant=minbase \
  --include=python3,python3-venv,ca-certificates bookworm "$root"
# The certificates of this machine, for networks that have their own.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
cp /etc/resolv.conf /etc/hosts "$root/etc/"
mkdir -p "$root/source" "$root/wheels" "$root/cache"
server=
trap '[[ -z $server ]] || { kill $server; wait $server; }; umount -R "$root"' EXIT
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
mount --bind "$source" "$root/source"

rm -rf "$root"/wheels/* "$root.log"
python3 -m pip wheel --quiet --no-deps --wheel-dir "$root/wheels" "$source"
"${enter[@]}" bash /source/deploy/docker/install.sh cpu /wheels /source
mount -o remount,bind,ro "$root"
mount -t tmpfs -o mode=2775,uid=10001,gid=0 tmpfs "$root/cache"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for user in 10001 54321; do
  as_user=("${enter[@]}" setpriv --reuid $user --regid 0 --clear-groups --no-new-privs --bounding-set=-all
    env USER=krea2 HF_HOME=/cache/huggingface KREA2_SERVE_ADDRESS_FILE=/tmp/krea2-serve.address)
  "${as_user[@]}" /bin/sh -c 'umask 0002 && exec krea2-serve "$@"' krea2-serve \
    --model-path /opt/krea-2-demo --host 127.0.0.1 --port $port >> "$root.log" 2>&1 &
  server=$!
  for _ in $(seq 300); do
    curl --silent --fail http://127.0.0.1:$port/ready && break
    kill -0 $server
    sleep 1
  done
  "${as_user[@]}" python3 -m krea2_server.health
  curl --silent --fail-with-body http://127.0.0.1:$port/v1/images/generations \
    --header 'content-type: application/json' --data '{"prompt": "a red heart on a yellow background", "size": "256x256"}' \
    --output "$root.json"
  kill -TERM $server
  wait $server
  server=
done
echo "
proven: installed, served, ended in order; the log is $root.log, the image in $root.json"
