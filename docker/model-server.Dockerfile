# Our model server: TensorFlow Serving's API where its image is not to be had. gRPC on 8500, REST on 8501.
# Versions are mounted at /models/digits, read-only. Build it in the repository's top folder:
#   docker build -f docker/model-server.Dockerfile -t digits-model-server --build-arg REVISION=$(git rev-parse HEAD) .
FROM python:3.11-slim-bookworm AS build
COPY requirements/model-server.txt /build/
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    python -m venv --without-pip /opt/venv \
 && python -m pip --python /opt/venv/bin/python install --disable-pip-version-check --root-user-action=ignore \
      --require-hashes --no-deps --only-binary=:all: --no-compile -r /build/model-server.txt
WORKDIR /app
COPY digits digits
COPY serving/__init__.py serving/
COPY serving/protos/__init__.py serving/protos/model_server_files_pb2.py serving/protos/
COPY serving/model_server serving/model_server
COPY serving/transport serving/transport
# Bytecode that holds no time of its source, also (-f) of what pip's own run has compiled: two builds of one commit are
# the same files.
RUN PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /opt/venv/lib .

FROM python:3.11-slim-bookworm
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="digits model server" \
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
    PYTHONUNBUFFERED=1
WORKDIR /app
USER 10001:10001
EXPOSE 8500 8501
# Healthy means that a version answers; before the first release it is not.
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "/usr/local/lib/digits/health.py", "http://127.0.0.1:8501/v1/models/digits", "AVAILABLE"]
ENTRYPOINT ["python", "-m", "serving.model_server", "--host=0.0.0.0", "--port=8500", "--rest_api_port=8501", "--prefer_tflite_model=true"]
CMD ["--model_name=digits", "--model_base_path=/models/digits"]
