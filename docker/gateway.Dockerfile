# The gateway: REST on 8080, gRPC on 50051. Build it in the repository's top folder:
#   docker build -f docker/gateway.Dockerfile -t digits-gateway --build-arg REVISION=$(git rev-parse HEAD) .
FROM python:3.11-slim-bookworm AS build
COPY requirements/gateway.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --disable-pip-version-check --root-user-action=ignore \
      --require-hashes --no-deps --only-binary=:all: --no-compile -r /build/gateway.txt
WORKDIR /app
COPY digits digits
COPY serving/__init__.py serving/client.py serving/
COPY serving/gateway serving/gateway
COPY serving/transport serving/transport
COPY serving/protos serving/protos
# Bytecode that holds no time of its source, also (-f) of what pip's own run has compiled: two builds of one commit are
# the same files.
RUN PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /opt/venv/lib .

FROM python:3.11-slim-bookworm
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="digits gateway" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.source=$SOURCE
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
COPY docker/health.py /usr/local/lib/digits/health.py
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DIGITS_HOST=0.0.0.0
WORKDIR /app
USER 10001:10001
EXPOSE 8080 50051
# Ready means that the model server has a version to serve; a balancer reads the same.
HEALTHCHECK --interval=5s --timeout=5s --start-period=10s --retries=3 \
  CMD ["python", "/usr/local/lib/digits/health.py", "http://127.0.0.1:8080/readyz"]
ENTRYPOINT ["python", "-m", "serving.gateway"]
