#!/usr/bin/env bash
# Measures `nitro serve` with the load generator of this repository, and prints Markdown.
#
#   scripts/measure_serving.sh                       # throughput: 1 to 64 clients, with and without batching
#   scripts/measure_serving.sh overload [SECONDS]    # ten times too many requests, for 600 s
#   scripts/measure_serving.sh all                   # both
#
# Environment: CLIENTS ("1 2 4 8 16 32 64"), SCALE (times all durations of the throughput test; 1 is four
# minutes), MAX_BATCH (8), TIMES (10), PRECISION (bf16), SERVE (further arguments of `nitro serve`),
# SKIP_BUILD=1 (take target/release as it is). The servers run on loopback; nothing else should run beside
# them.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-throughput}
scale=${SCALE:-1}
max_batch=${MAX_BATCH:-8}
read -ra serve <<< "--precision ${PRECISION:-bf16} --quiet ${SERVE:-}"
read -ra clients <<< "${CLIENTS:-1 2 4 8 16 32 64}"

if [ -z "${SKIP_BUILD:-}" ]; then
  cargo build --release -p nitro -p nitro-server --bin nitro --example load
fi
nitro=target/release/nitro
load=target/release/examples/load
logs=$(mktemp -d)
servers=()
stop() {
  for server in "${servers[@]}"; do kill -TERM "$server" 2>/dev/null && wait "$server" || true; done
  servers=()
}
trap 'stop; rm -rf "$logs"' EXIT

# start NAME ARGUMENTS...: starts a server on a free port; its address is in $url.
start() {
  local log="$logs/$1"
  shift
  "$nitro" serve --port 0 "${serve[@]}" "$@" > "$log" 2>&1 &
  servers+=($!)
  for _ in $(seq 600); do
    url=$(sed -n 's/^ready: //p' "$log")
    if [ -n "$url" ]; then return; fi
    kill -0 "$!" 2>/dev/null || break
    sleep 0.1
  done
  echo "the server did not start:" >&2
  cat "$log" >&2
  exit 1
}

throughput() {
  start batched --max-batch "$max_batch" --max-queue 256
  local batched=$url
  start single --max-batch 1 --max-queue 256
  local single=$url
  echo "| clients | batches of up to $max_batch: images/s | p50 s | p95 s | one at a time: images/s | p50 s | p95 s |"
  echo "| --- | --- | --- | --- | --- | --- | --- |"
  # Side by side, so that both see the same machine.
  for count in "${clients[@]}"; do
    # More clients wait longer for their pictures.
    local time
    time=$(awk -v c="$count" -v x="$scale" \
      'BEGIN { t = int((8 + 3.7 * log(c) / log(2)) * x); print t < 2 ? 2 : t }')
    local rows=()
    for url in "$batched" "$single"; do
      rows+=("$("$load" --headless 1 --url "$url" --clients "$count" --seconds "$time")")
    done
    # From `| clients | images/s | p50 s | p95 s | refused | errors | server MiB |` of each.
    printf '%s\n' "${rows[@]}" | awk -F'|' '
      NR == 1 { row = "|" $2 "|" } { row = row $3 "|" $4 "|" $5 "|"; bad += $6 + $7 }
      END { print row; if (bad) print bad " requests gave no picture" > "/dev/stderr"; exit bad > 0 }'
  done
  echo
  echo "With batching: $(curl -s "$batched/metrics" | awk '
    /^nitro_batch_pictures_sum/ { sum = $2 } /^nitro_batch_pictures_count/ { count = $2 }
    END { printf "%.1f pictures per step on average", sum / count }')"
  stop
}

overload() {
  start overload --max-batch "$max_batch"
  "$load" --url "$url" --overload "${1:-600}" --times "${TIMES:-10}"
  stop
}

case $what in
  throughput) throughput ;;
  overload) overload "${2:-600}" ;;
  all) throughput; echo; overload "${2:-600}" ;;
  *) sed -n '2,11p' "$0" >&2; exit 2 ;;
esac
