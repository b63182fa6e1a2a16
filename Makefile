# `make run` on a fresh machine: environment, data, pipeline, model server, gateway. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
TOOLS := .tools
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DO_NOT_TRACK := 1

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The environment is rebuilt when the lock changes.
$(VENV)/.lock: requirements/dev.txt
	@requirements/install $(PYTHON) $(VENV) $<

$(TOOLS)/.lock: requirements/tools.txt
	@requirements/install $(PYTHON) $(TOOLS) $<

.PHONY: env
env: $(VENV)/.lock ## build .venv from the lock

.PHONY: tools
tools: $(TOOLS)/.lock ## build .tools, which checks manifests and images

.PHONY: run
run: env ## everything: data, training, publishing, serving, on http://localhost:8080
	@python -m pipelines run

.PHONY: check
check: env ## lint, format, types, import rules
	@ruff check . && ruff format --check . && mypy && lint-imports --no-cache && hadolint docker/*.Dockerfile

# Three workers for two cores: a quarter of the tests' time is waiting for servers and browsers.
.PHONY: test
test: env tools ## everything that must pass
	@python -m pytest -n 3 --no-loadscope-reorder $(ARGS)

.PHONY: stack-test
stack-test: env ## the container stack end to end; needs Docker
	@python -m pytest --stack tests/stack/test_compose.py $(ARGS)

IMAGES := gateway model-server pipeline

.PHONY: sbom
sbom: tools ## bills of materials of the images (CycloneDX), from the locks, in test-output/
	@mkdir -p test-output
	@for image in $(IMAGES); do \
	  $(TOOLS)/bin/cyclonedx-py requirements requirements/$$image.txt --output-reproducible --of JSON -o test-output/$$image.cdx.json || exit 1; \
	done

.PHONY: audit
audit: tools ## known vulnerabilities of what the images install; needs a package index that publishes them
	@for image in $(IMAGES); do \
	  $(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r requirements/$$image.txt || exit 1; \
	done

.PHONY: bench
bench: env ## side-by-side benchmarks
	@python -m benchmarks $(ARGS)

PEERS := fastapi litserve bentoml mlserver ray

.PHONY: bench-peers
bench-peers: env $(PEERS:%=.peers/%/.lock) ## other servers of the same model, each in an environment of its own, beside ours
	@python -m benchmarks peers $(ARGS)

.peers/%/.lock: benchmarks/peers/%.txt
	@requirements/install $(PYTHON) .peers/$* $<

.PHONY: generated
generated: env ## write what is made from other files: the API reference, the cluster's alert rules, the dashboards
	@python -m docs.generate && python -m monitoring.generate

.PHONY: protos
protos: env ## generate serving/protos/*_pb2.py from the .proto files
	@python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. serving/protos/*.proto
	@python -m grpc_tools.protoc -I. --grpc_python_out=. $$(grep -l '^service ' serving/protos/*.proto)
