# Weft's make targets. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --warn-undefined-variables --no-builtin-rules
.DEFAULT_GOAL := help

VERSION   := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GO_TOOL   := go tool -modfile=tools/go.mod
UNIT      := $$(go list ./... | grep -v '/e2e\b')

# Each can be set on the command line: make bench BENCH=Merge BENCHTIME=3s
BENCH     := .
BENCHTIME := 1s
FUZZTIME  := 20s
DEMOFLAGS :=

##@ Run

.PHONY: build
build: ## Build the binaries into bin/
	go build -trimpath -buildvcs=false -ldflags "-X main.version=$(VERSION)" -o bin/ ./cmd/...

.PHONY: demo
demo: build ## Run three clusters on this machine and break them (DEMOFLAGS=--keep)
	bin/weft demo $(DEMOFLAGS)

##@ Test

.PHONY: test
test: envoy ## Vet, and run every unit test in a random order
	go vet ./...
	go test -shuffle=on $(UNIT)

.PHONY: race
race: envoy ## Run the unit tests under the race detector
	go test -race -shuffle=on $(UNIT)

.PHONY: e2e
e2e: envoy ## Run the end-to-end suites: many clusters, and Envoy in a gateway's place
	go test -count=1 -timeout 20m ./e2e/...

.PHONY: cover
cover: ## Write the unit tests' coverage to bin/cover.html
	mkdir -p bin
	go test -coverprofile=bin/cover.out $(UNIT)
	go tool cover -html=bin/cover.out -o bin/cover.html
	go tool cover -func=bin/cover.out | tail -n 1

.PHONY: bench
bench: ## Run the benchmarks (BENCH=regexp BENCHTIME=1s)
	go test -run '^$$' -bench '$(BENCH)' -benchtime '$(BENCHTIME)' -benchmem $(UNIT)

.PHONY: fuzz
fuzz: ## Run each fuzz target for a while (FUZZTIME=20s)
	go list ./... | while read -r pkg; do \
		go test -list '^Fuzz' "$$pkg" | sed -n '/^Fuzz/p' | while read -r target; do \
			echo "$$pkg $$target"; \
			go test -run '^$$' -fuzz "^$$target$$" -fuzztime '$(FUZZTIME)' "$$pkg" </dev/null; \
		done; \
	done

.PHONY: lint
lint: ## Check style, imports, protobuf and the format of every file
	$(GO_TOOL) golangci-lint run
	$(GO_TOOL) buf lint
	$(GO_TOOL) buf format --diff --exit-code

.PHONY: ci
ci: ## Run everything that must pass before a change lands
	.ci/run

##@ Maintain

.PHONY: generate
generate: ## Write the generated code again
	$(GO_TOOL) buf generate
	go generate ./...

.PHONY: check-generated
check-generated: ## Fail when the generated code is not what its sources give
	.ci/check-generated.sh

.PHONY: fmt
fmt: ## Format Go and protobuf
	$(GO_TOOL) golangci-lint fmt
	$(GO_TOOL) buf format --write

.PHONY: envoy
envoy: ## Fetch the pinned Envoy into the cache; without it, tests that need it are skipped
	@tools/envoy.sh >/dev/null || [ -z "$${CI:-}" ]

.PHONY: clean
clean: ## Remove what make built (the caches outside the checkout stay)
	rm -rf bin dist

.PHONY: help
help: ## Print this list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
