#!/usr/bin/env bash
# Builds, tests and measures on a CUDA machine without network: see --help.
# PYTHON names the interpreter that has PyTorch (default: python3).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec "${PYTHON:-python3}" "$here/gpu_suite.py" "$@"
