#!/usr/bin/env bash
# Installs krea2-srt: in the image, and in the clean root of prove.sh, by the same steps.
#
#   install.sh gpu WHEELS SOURCE   on top of SGLang's image, into its Python: what is there stays
#   install.sh cpu WHEELS SOURCE   into /opt/krea2, with the versions of requirements.lock
#
# WHEELS is a folder with our wheel, SOURCE the repository.
set -euo pipefail
target=$1 wheels=$2 source=$3

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
wheel=$(echo "$wheels"/krea2_srt-*.whl)

# SGLang pins versions that have no Krea 2; pyproject.toml says which ones we put in their place.
python3 - "$source/pyproject.toml" > "$work/overrides" <<'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["tool"]["uv"]["override-dependencies"], sep="\n")
END

case $target in
  gpu)
    command -v uv >/dev/null || python3 -m pip install --no-cache-dir uv
    # The kernels of the image fit its torch and nothing else: everything keeps its version, but
    # for what is overridden.
    overridden=$(sed 's/==.*//' "$work/overrides" | paste -sd '|')
    uv pip freeze --system | grep -E '^[A-Za-z0-9._-]+==' | grep -vE "^($overridden)==" > "$work/kept"
    uv pip install --system --break-system-packages --no-cache \
      --override "$work/overrides" --constraint "$work/kept" "$wheel[demo,fa4,otel,ray,s3,serve]"
    python=python3
    ;;
  cpu)
    python3 -m venv /opt/krea2
    python=/opt/krea2/bin/python
    "$python" -m pip install --no-cache-dir --quiet uv
    /opt/krea2/bin/uv pip install --python "$python" --no-cache --quiet \
      --override "$work/overrides" --constraint "$source/requirements.lock" "$wheel[demo,otel,ray,s3,serve]"
    /opt/krea2/bin/krea2-demo-model /opt/krea-2-demo
    ;;
  *)
    echo "install.sh: $target: must be gpu or cpu" >&2
    exit 2
    ;;
esac

"$python" -m krea2_srt.cli.compile_bytecode
