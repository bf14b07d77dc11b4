# SPDX-License-Identifier: Apache-2.0
# What a person types. The work itself is in cargo and `cargo xtask`.

.PHONY: help setup setup-codegen setup-cluster build demo demo-cluster test test-all test-unit bench fuzz lint codegen docs
.DEFAULT_GOAL := help
# Where rustup puts cargo, for a shell that has not been told.
export PATH := $(PATH):$(HOME)/.cargo/bin

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: ## Install the system packages that are missing (Debian)
	@./xtask/setup.sh

setup-cluster: ## The same, and what real Kubernetes on this machine needs
	@./xtask/setup.sh cluster

setup-codegen:
	@./xtask/setup.sh codegen

build: setup ## Build all programs
	cargo build --workspace --bins

demo: build ## Two simulated nodes, pods, real programs, and what crosses the wire (root)
	cargo run --quiet --bin podveilctl -- demo $(DEMO)

demo-cluster: setup-cluster ## The whole journey on real Kubernetes: install, label, curl, uninstall (root, Go 1.26.6)
	cargo xtask cluster demo

test: setup-cluster ## All tests, those in network namespaces and on real Kubernetes included (root, Go 1.26.6)
	cargo xtask test

test-all: setup-cluster ## The same, and whole matrices of which it has one of each kind
	cargo xtask test everything

test-unit: setup ## The tests that need no privileges
	cargo xtask test unit

bench: setup ## Raw TCP, plain path and HBONE side by side (root)
	cargo xtask bench

fuzz: ## Every fuzz target for a short while (nightly Rust and cargo-fuzz)
	cargo xtask fuzz

lint: setup-codegen ## Formatting, clippy, generated files
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- --deny warnings
	cargo xtask codegen --check
	cargo xtask docs --check

codegen: setup-codegen ## Rust from the .proto files, objects from the eBPF programs
	cargo xtask codegen

docs: ## docs/configuration.md from the configuration types
	cargo xtask docs
