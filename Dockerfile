# syntax=docker/dockerfile:1
#
#   docker build -t krea2-srt .                                   # on SGLang's image, for GPUs
#   docker build -t krea2-srt:cpu --build-arg BASE=python:3.11-slim-bookworm \
#     --build-arg TARGET=cpu --build-arg MODEL=/opt/krea-2-demo . # the demo checkpoint, anywhere
#
# docs/operations.md says how to run it.
ARG BASE=lmsysorg/sglang:v0.5.23

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG TARGET=gpu
ARG MODEL=krea/Krea-2-Turbo

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    --mount=from=wheel,source=/source,target=/source \
    bash /source/deploy/docker/install.sh "${TARGET}" /wheels /source

# A fixed number, so that volumes can be given to it, in group 0, which may write too: OpenShift runs
# an image as any user of that group.
RUN useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home krea2 \
 && install --directory --owner=10001 --group=0 --mode=2775 /cache
USER 10001:0

# All that is written: the root file system may be read-only. Models, compiled kernels and images
# are in /cache, which should be a volume; /tmp is for what a process needs while it runs. USER is for
# who asks a user without a name for it, as PyTorch does.
VOLUME /cache
WORKDIR /cache
ENV PATH=/opt/krea2/bin:${PATH} \
    HOME=/cache \
    USER=krea2 \
    HF_HOME=/cache/huggingface \
    KREA2_SERVE_MODEL_PATH=${MODEL} \
    KREA2_SERVE_HOST=0.0.0.0 \
    KREA2_SERVE_ADDRESS_FILE=/tmp/krea2-serve.address \
    KREA2_SERVE_LOG_FORMAT=json

EXPOSE 30000
# Alive, not ready: a model that is being loaded is no reason to start it again. It asks at the port
# that the server was given, whichever way.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python3", "-m", "krea2_server.health"]
# Finishes what was accepted, for up to --drain-timeout-s.
STOPSIGNAL SIGTERM
# What it writes is the group's: the next start may be as another user.
ENTRYPOINT ["/bin/sh", "-c", "umask 0002 && exec krea2-serve \"$@\"", "krea2-serve"]
