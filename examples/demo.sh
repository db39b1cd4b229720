#!/usr/bin/env bash
# A router, two simulated workers, five requests, and who served them: builds the package, installs it into a fresh
# .venv, runs the guide's own two scripts, shows the traces, and stops all it started.
set -euo pipefail
cd "$(dirname "$0")/.."

for port in 30001 30002 30003; do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
        echo "demo: port $port is taken: stop what listens on it, and run this again" >&2
        exit 1
    fi
done

rm -rf .venv
make --no-print-directory install
python=.venv/bin/python
log=$(mktemp -d)
started=()

stop() {
    for process in ${started[@]+"${started[@]}"}; do kill -TERM "$process" 2>/dev/null || true; done
    for process in ${started[@]+"${started[@]}"}; do wait "$process" 2>/dev/null || true; done
    rm -rf "$log"
}
trap stop EXIT

# Waits until a command succeeds; shows the log of what it waits for when it does not.
wait_for() {
    for _ in $(seq 150); do
        "${@:2}" >/dev/null 2>&1 && return
        sleep 0.1
    done
    echo "demo: gave up waiting for: ${*:2}" >&2
    cat "$1" >&2
    exit 1
}

answers() {
    $python -c "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=1)" "$1"
}

echo "== two simulated workers on ports 30002 and 30003"
$python -m sglang_router_rs sim --ports 30002-30003 >"$log/sim" 2>&1 &
started+=($!)
wait_for "$log/sim" answers http://127.0.0.1:30003/health

echo "== the router on port 30001: examples/start_test_router.py"
$python examples/start_test_router.py >"$log/router" 2>&1 &
started+=($!)
wait_for "$log/router" answers http://127.0.0.1:30001/readiness

echo "== the client: examples/test_request_tracking.py"
$python examples/test_request_tracking.py | tee "$log/client"
if grep -q "❌" "$log/client" || [ "$(grep -c "✅" "$log/client")" -ne 6 ]; then
    echo "demo: a step of the client failed; the router's log:" >&2
    cat "$log/router" >&2
    exit 1
fi

echo
echo "== which worker served which request, and why"
$python examples/show_traces.py http://127.0.0.1:30001
