#!/usr/bin/env bash
# Runs a test or a benchmark as root, on the caller's path: cargo calls it where the tests are not run by root.
exec sudo --preserve-env -- env "PATH=$PATH" "$@"
