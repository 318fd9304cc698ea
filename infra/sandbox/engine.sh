#!/usr/bin/env bash
# The Docker engine that the sandbox runs on, for Debian without a running engine: install, start, check.
#   engine.sh          install what is missing, start dockerd if none answers, wait until it does
#   engine.sh stop     stop the dockerd that this script started
# Needs root to install and to start. An engine that answers already is left as it is.
set -euo pipefail

STATE=${M1_ENGINE_STATE:-/var/lib/m1-engine}
PID_FILE=$STATE/dockerd.pid
LOG=$STATE/dockerd.log
SOCKET=${DOCKER_HOST:-unix:///var/run/docker.sock}

fail() { echo "error: $*" >&2; exit 1; }

answers() { docker --host "$SOCKET" version --format '{{.Server.Version}}' 2>/dev/null; }

# The process in the pid file, if it is a dockerd still: the system hands old numbers out again.
ours() {
	local pid
	pid=$(cat "$PID_FILE" 2>/dev/null) || return 1
	test "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd && echo "$pid"
}

stop() {
	local pid
	pid=$(ours) || { echo "engine: none that this script started"; return; }
	kill "$pid"
	for _ in $(seq 100); do
		ours >/dev/null || { rm -f "$PID_FILE"; echo "engine: stopped (pid $pid)"; return; }
		sleep 0.2
	done
	fail "dockerd (pid $pid) does not stop; see $LOG"
}

install() {
	command -v apt-get >/dev/null || fail "no apt-get here; install a Docker engine (20.10 or newer) your own way"
	test "$(id -u)" = 0 || fail "installing the engine needs root: sudo $0"
	# Services are not started by the packages: what starts the engine is below, and the same on every machine.
	export DEBIAN_FRONTEND=noninteractive
	test -n "$(apt-cache policy docker.io 2>/dev/null | grep 'Candidate: [0-9]')" || apt-get update -qq
	local packages=(docker.io debootstrap iptables)
	get "${packages[@]}" || { apt-get update -qq && get "${packages[@]}"; } ||
		fail "apt-get could not install ${packages[*]}; see $STATE/apt.log"
}

# Without waiting for the disk after every file: on a busy one that is most of the time.
get() {
	apt-get install -y -qq --no-install-recommends -o DPkg::Options::=--force-unsafe-io "$@" >"$STATE/apt.log" 2>&1
}

start() {
	test "$(id -u)" = 0 || fail "starting dockerd needs root: sudo $0"
	local started
	started=$(ours) || { launch; started=$!; }
	for _ in $(seq 300); do
		answers >/dev/null && return
		kill -0 "$started" 2>/dev/null || fail "dockerd ended; the end of $LOG: $(tail -n 3 "$LOG" | tr '\n' ' ')"
		sleep 0.2
	done
	fail "dockerd does not answer after 60 s; see $LOG"
}

launch() {
	rm -f "$PID_FILE" # of a dockerd that was killed: the next one would take whoever has its number now for itself
	# Sandboxes have no network, so the engine needs neither a bridge nor a word with the firewall.
	setsid nohup dockerd --host "$SOCKET" --bridge=none --iptables=false --ip-forward=false --pidfile "$PID_FILE" \
		>"$LOG" 2>&1 </dev/null &
}

case ${1:-start} in
stop)
	stop
	;;
start)
	how="found running"
	if ! answers >/dev/null; then
		test "$(id -u)" != 0 || mkdir -p "$STATE"
		command -v dockerd >/dev/null && command -v debootstrap >/dev/null || install
		start
		how="started, pid $(cat "$PID_FILE" 2>/dev/null || echo '?'), log $LOG"
	fi
	echo "engine: docker $(answers) at $SOCKET ($how)"
	;;
*)
	fail "unknown word '$1': give 'start' (the default) or 'stop'"
	;;
esac
