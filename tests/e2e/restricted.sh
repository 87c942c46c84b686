#!/usr/bin/env bash
# Runs a command as the image does: another user, no rights, nothing to write to but /srv, and none
# of the environment that it is called in.
# In a mount namespace of its own (unshare --mount).
#
#   restricted.sh USER:GROUP CACHE MODEL HOME_OF_PYTHON HIDDEN COMMAND...
#
# CACHE is then /srv/cache, and MODEL /srv/model; a CACHE of "" is a new one. HIDDEN is the folder that keeps other users from Python, or "".
set -euo pipefail
ids=$1 cache=$2 model=$3 python=$4 hidden=$5
shift 5

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /srv
mkdir /srv/model /srv/python
mkdir --mode=777 /srv/cache /srv/tmp
mount --bind "$model" /srv/model
[[ -z $cache ]] || mount --bind "$cache" /srv/cache
if [[ -n $hidden ]]; then
  mount --bind "$python" /srv/python
  mount -t tmpfs -o mode=755 tmpfs "$hidden"
  mkdir -p "$python"
  mount --bind /srv/python "$python"
fi
mount -o remount,bind,ro /

cd /srv/cache
exec setpriv --reuid "${ids%:*}" --regid "${ids#*:}" --clear-groups --no-new-privs \
  --bounding-set=-all --inh-caps=-all \
  env -i PATH="$PATH" HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive \
  HOME=/srv/cache HF_HOME=/srv/cache/huggingface TMPDIR=/srv/tmp "$@"
