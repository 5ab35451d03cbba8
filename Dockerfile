# syntax=docker/dockerfile:1
#
# The production image: the gateway and its locked packages, without the sandbox.
#
#     docker build --tag imaging-gateway \
#         --build-arg VERSION=0.4.0 --build-arg REVISION="$(git rev-parse HEAD)" \
#         --build-arg CREATED="$(date --utc +%Y-%m-%dT%H:%M:%SZ)" --build-arg SOURCE=https://... .
#
# A tag moves. Build a release on a digest of the base image (`docker buildx imagetools inspect python:3.13-slim`), which
# the label org.opencontainers.image.base.name then contains:
#
#     --build-arg PYTHON_IMAGE=python:3.13-slim@sha256:...
#
# Behind a company's proxy: `--build-arg HTTPS_PROXY=...`, which no layer keeps. If it inspects TLS, mount the certificates
# with its authority for the build; no layer keeps them either:
#
#     --secret id=certificates,src=/etc/ssl/certs/ca-certificates.crt
#
# `make image-check` builds this file and runs a smoke test in the image.

# Any image with Python 3.11 or newer, its venv module, and the certificates of Debian's ca-certificates.
ARG PYTHON_IMAGE=python:3.13-slim


FROM ${PYTHON_IMAGE} AS build

# As in the Makefile.
ARG UV_VERSION=0.13.9

# Optional features: `otel` sends traces, `local` is the sandbox, which production does not need.
ARG EXTRAS=otel

# Compile bytecode once, without checks against the times of the sources: a copy of the layer may round them.
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PROJECT_ENVIRONMENT=/app \
    UV_PYTHON_DOWNLOADS=never

RUN --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv /uv && \
    /uv/bin/pip install --no-cache-dir --disable-pip-version-check --no-input --only-binary :all: "uv==${UV_VERSION}"

WORKDIR /source

# The packages change less often than the code, so their layer depends on the lock file only.
COPY pyproject.toml uv.lock ./
RUN --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    set -- && for extra in ${EXTRAS}; do set -- "$@" --extra "${extra}"; done && \
    /uv/bin/uv sync --locked --no-dev "$@" --no-editable --no-install-project

COPY README.md ./
COPY service service
RUN --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    set -- && for extra in ${EXTRAS}; do set -- "$@" --extra "${extra}"; done && \
    /uv/bin/uv sync --locked --no-dev "$@" --no-editable && \
    rm /app/.lock


FROM ${PYTHON_IMAGE}

ENV PATH=/app/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GATEWAY_ENV=production \
    GATEWAY_HOST=0.0.0.0 \
    GATEWAY_OPS_HOST=0.0.0.0

# Owned by root, so that the gateway can't change its own files.
COPY --from=build /app /app
COPY --chmod=0444 deploy/healthcheck.py /app/healthcheck.py

# A number: Kubernetes' runAsNonRoot can't resolve names, and the image has no such user.
USER 65532:65532
WORKDIR /

# The tenants' port, and the operators'.
EXPOSE 8080 8081

STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "/app/healthcheck.py"]

ENTRYPOINT ["gateway"]
CMD ["serve"]

# Last, since they change with every build.
ARG PYTHON_IMAGE
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="Imaging Gateway" \
      org.opencontainers.image.description="An internal REST gateway in front of a paid image-processing API" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"
