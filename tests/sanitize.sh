#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a temporary folder and runs the tests
# that reach C on it, those of calls on a GPU with the emulated kernels. What a kernel does is watched by the emulation,
# and runs on stacks of its own, so the sanitizers see csrc/ alone. Leaks are looked for by tests/test_leaks.py and
# tests/cuda/test_cuda_calls.py, on the ordinary builds.
#
#   tests/sanitize.sh [PYTEST ARGUMENTS]        PYTHON=python3.11 tests/sanitize.sh -k border
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/tree"
cp -r bitdelta csrc kernels tests README.md pyproject.toml setup.py "$work/tree"
cd "$work/tree"
rm -f bitdelta/_C.*.so
BITDELTA_SANITIZE=1 BITDELTA_CUDA=emulate "$python" setup.py -q build_ext --inplace >"$work/build.log" 2>&1 || {
    cat "$work/build.log"
    exit 1
}

compiler=${CC:-gcc}
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONMALLOC=malloc PYTHONPATH=$work/tree
"$python" -c 'from bitdelta import _C; assert _C.build_info()["sanitize"], "not the sanitized build"'
tests=(tests/test_border.py tests/test_delta.py tests/test_linear.py tests/test_isa.py)
tests+=(tests/cuda/test_cuda_border.py tests/cuda/test_cuda_calls.py tests/cuda/test_cublas.py)
"$python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "not keeps_nothing" "$@"
