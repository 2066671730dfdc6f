#!/bin/sh
# compute-sanitizer over the SSD kernels on a small grid of odd shapes: accesses out of bounds, races in shared memory.
#     evals/sanitize.sh [TOOL ...]       memcheck and racecheck; PYTHON and LIMIT (seconds for each tool) can be set
# For racecheck the kernels take the form of racecheck_ptx.py, and its control has to come out as it should; no other
# process should use the GPU then.
# torch's own kernels are not instrumented. Allocations are not cached, so that each tensor has its own bounds.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
limit=${LIMIT:-120}
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
bad=0
check() { # TOOL PROGRAM [ARGUMENT ...]
    tool=$1
    shift
    timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --kernel-name-exclude kernel_substring=native --kernel-name-exclude kernel_substring=gemm \
        --kernel-name-exclude kernel_substring=cutlass --kernel-name-exclude kernel_substring=cub \
        --target-processes application-only "$python" "$@"
}
[ $# -gt 0 ] || set -- memcheck racecheck
for tool in "$@"; do
    form=
    [ "$tool" = racecheck ] && form=--for-racecheck
    "$python" evals/ssd_once.py --small-grid $form || exit 1 # compiles, so that the sanitizers do not wait for it
    if [ "$tool" = racecheck ]; then
        for control in barrier:0 mbarrier:0 none:9; do
            echo "== racecheck, control ${control%:*}"
            check racecheck evals/racecheck_control.py "${control%:*}" $form
            status=$?
            echo "== exit status $status, should be ${control#*:}"
            [ $status -eq "${control#*:}" ] || bad=1
        done
    fi
    echo "== $tool"
    check "$tool" evals/ssd_once.py --small-grid $form
    status=$?
    echo "== $tool: exit status $status (9: it found something; 124: out of time)"
    [ $status -eq 0 ] || bad=1
done
exit $bad
