# Data, training and release. /project is the workspace: mount a volume there, and another at /project/models, which the
# model server shares. The code lies in /app and is copied into the workspace at start, so that a new image brings its
# code to an old volume. Build it in the repository's top folder:
#   docker build -f docker/pipeline.Dockerfile -t digits-pipeline --build-arg REVISION=$(git rev-parse HEAD) .
FROM python:3.11-slim-bookworm AS build
COPY requirements/pipeline.txt /build/
# One package comes as source only; it is built with the locked setuptools, not with one fetched for the purpose.
# Bytecode as in docker/model-server.Dockerfile.
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    python -m venv --without-pip /opt/venv \
 && sed -n '/^setuptools==/,/# via/p' /build/pipeline.txt > /build/setuptools.txt \
 && python -m pip --python /opt/venv/bin/python install --disable-pip-version-check --root-user-action=ignore \
      --require-hashes --no-deps --only-binary=:all: --no-compile -r /build/setuptools.txt \
 && python -m pip --python /opt/venv/bin/python install --disable-pip-version-check --root-user-action=ignore \
      --require-hashes --no-deps --no-build-isolation --only-binary=:all: --no-binary=antlr4-python3-runtime \
      --no-compile -r /build/pipeline.txt \
 && PYTHONHASHSEED=0 /opt/venv/bin/python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash /opt/venv/lib
WORKDIR /app
COPY digits digits
COPY training training
COPY pipelines pipelines
# The candidate is served for a moment before it is judged.
COPY serving/__init__.py serving/
COPY serving/protos/__init__.py serving/protos/model_server_files_pb2.py serving/protos/
COPY serving/model_server serving/model_server
COPY serving/transport serving/transport
COPY data.dvc dvc.yaml params.yaml prefect.yaml .dvcignore ./
COPY .dvc/config .dvc/config
COPY models/champion/README.md models/champion/README.md
# There is no git in here: the image's revision says which commit this is.
RUN printf '[core]\n    no_scm = true\n' > .dvc/config.local \
 && install -d -o 10001 -g 10001 /project /project/models /project/.dvc /project/.dvc/tmp /secrets

FROM python:3.11-slim-bookworm
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="digits pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.source=$SOURCE
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
COPY --from=build --chown=10001:10001 /project /project
COPY --from=build --chown=10001:10001 /secrets /run/secrets/digits
COPY docker/health.py docker/pipeline.py /usr/local/lib/digits/
# Prefect and others ask for the user's name.
RUN groupadd --gid 10001 digits && useradd --uid 10001 --gid digits --no-create-home --home-dir /tmp digits
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    DVC_SITE_CACHE_DIR=/tmp/dvc \
    PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 \
    DIGITS_REVISION=$REVISION
WORKDIR /project
USER 10001:10001
VOLUME ["/project", "/project/models"]
# Healthy means that a version is published.
HEALTHCHECK --interval=5s --timeout=5s --start-period=60m --retries=3 \
  CMD ["python", "/usr/local/lib/digits/pipeline.py", "is-published"]
ENTRYPOINT ["python", "/usr/local/lib/digits/pipeline.py"]
CMD ["serve"]
