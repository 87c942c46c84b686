#!/usr/bin/env bash
# One image with SGLang's own command; the plugin is used once it is installed.
#
#   examples/sglang_generate.sh [MODEL] [PROMPT]
set -euo pipefail
sglang generate --model-path "${1:-krea/Krea-2-Turbo}" \
  --prompt "${2:-a red fox sitting in fresh snow, golden hour, photorealistic}" \
  --num-inference-steps 8 --height 1024 --width 1024 --save-output
